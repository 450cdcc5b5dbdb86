"""Checks of the columns that `text.tokenize` is given: texts, weights and token weights."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from easy_jax.data.bad_examples import BadExamples
from easy_jax.data.ragged import Ragged
from easy_jax.data.records import not_text
from easy_jax.data.sources import DataError

_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def check(
    instructions: Sequence[Any],
    responses: Sequence[Any],
    inputs: Sequence[Any],
    weights: Sequence[Any] | None,
    token_weights: Sequence[Any] | None,
    bad: BadExamples,
) -> None:
    """Records the examples whose fields are not text, or whose weights are not valid."""
    if len(instructions) != len(responses):
        raise DataError(f"{len(instructions)} instructions for {len(responses)} responses")
    others = {"inputs": inputs, "weights": inputs if weights is None else weights}
    for name, values in others.items():
        if len(values) != len(responses):
            raise DataError(f"{len(values)} {name} for {len(responses)} responses")
    if not len(responses):
        raise DataError("the data set is empty: it has no examples")
    columns = {"instruction": instructions, "response": responses}
    for what, texts in columns.items():
        for i, text in enumerate(texts):
            if wrong := not_text(text):
                bad.add(i, f"{what} is {wrong[0]}", wrong[1])
    for i, text in enumerate(inputs):
        if text is not None and (wrong := not_text(text)):
            bad.add(i, f"input is {wrong[0]}", wrong[1])
    for name, column in {"weights": weights, "token weights": token_weights}.items():
        if column is not None and all(value is None for value in column):
            raise DataError(f"no record has {name}: is the name of their field right?")
    for i, weight in enumerate([] if weights is None else weights):
        if fault := _wrong_weight(weight):
            bad.add(i, f"weight is {fault}", repr(weight)[:40])
    _check_token_weights(token_weights, len(responses), bad)


def _check_token_weights(token_weights: Sequence[Any] | None, size: int, bad: BadExamples) -> None:
    """Records the examples whose token weights are not a list of finite numbers of at least 0."""
    if token_weights is None:
        return
    if len(token_weights) != size:
        raise DataError(f"{len(token_weights)} lists of token weights for {size} responses")
    for i, weights in enumerate(token_weights):
        if not isinstance(weights, list | tuple | np.ndarray):
            bad.add(i, "token weights are not a list of numbers", repr(weights)[:40])
        elif wrong := [weight for weight in weights if _wrong_weight(weight)]:
            bad.add(i, f"a token weight is {_wrong_weight(wrong[0])}", repr(wrong[0])[:40])


def wrong_length(
    token_weights: Sequence[Sequence[float]] | None, example_id: int, targets: Sequence[int]
) -> tuple[str, str] | None:
    """Returns what is wrong if an example has not one weight for each target token."""
    if token_weights is None or len(token_weights[example_id]) == len(targets):
        return None
    found = f"{len(token_weights[example_id])} token weights, {len(targets)} target tokens"
    return "the number of token weights is not that of target tokens", found


def ragged(token_weights: Sequence[Sequence[float]] | None, bad: BadExamples) -> Ragged | None:
    """Returns the token weights of all examples, none of those that are left out."""
    if token_weights is None:
        return None
    parts = [[] if i in bad else list(weights) for i, weights in enumerate(token_weights)]
    offsets = np.cumsum([0, *map(len, parts)])
    return Ragged(np.array([w for part in parts for w in part], np.float32), offsets)


def _wrong_weight(value: Any) -> str:
    """Returns what is wrong with a weight, or an empty text."""
    value = float(value) if isinstance(value, Decimal) else value
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 <= value <= _LARGEST:
        return "not a finite number of at least 0"
    return "not 0, but too small for float32" if 0 < value < _SMALLEST else ""
