"""Checks of the arguments of `score` and `fit`, and of a train state before it is saved."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easy_jax import data
from easy_jax.core import contract
from easy_jax.core.step import TrainState
from easy_jax.data import text
from easy_jax.data.sources import check_numbers
from easy_jax.train import compatibility
from easy_jax.train.hooks import TrainingError


def check_call(who: str, model: Any, source: data.AnySource) -> None:
    """Checks that a model is an NNX module and that a source can be read.

    Args:
      who: the name of the function that was called, for the message.
      model: the object that must be an NNX module.
      source: the object that must be a data source.

    Raises:
      ContractError: the model is not a Flax NNX module.
      DataError: the source has no length or records, or an in-memory field that is not numeric.

    Example:
      >>> check_call("score", nnx.Linear(1, 1, rngs=nnx.Rngs(0)), iter([]))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      easy_jax.data.sources.DataError: a list_iterator is no source: it needs a length ...
    """
    contract.check_model(model, who)
    check_source(source)


def check_match(
    model: nnx.Module,
    source: data.AnySource,
    loss_fn: Callable[..., Any],
    used_N: np.ndarray | None = None,
) -> None:
    """Checks that a model fits the data: vocabulary, number and names of classes, normalisation.

    Args:
      model: the model to check.
      source: the data that it is trained or scored on.
      loss_fn: the loss function, `(model, batch) -> losses`.
      used_N: bool by example id: the examples whose labels and tokens are checked; default: all.

    Raises:
      DataError: see `check_tokens` and `compatibility.check_classifier`.
    """
    check_tokens(model, source, used_N)
    compatibility.check_classifier(model, source, loss_fn, used_N=used_N)


def check_source(source: data.AnySource) -> None:
    """Raises DataError for an invalid data source, or for in-memory fields that are not numeric."""
    if isinstance(source, data.TokenSource):
        raise data.DataError(
            "a TokenSource has examples of different lengths; give "
            "PackedSource(examples, row_length=...)"
        )
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) and not isinstance(
        source, data.PackedSource
    ):
        raise data.DataError(
            f"a {type(source).__name__} is no source: it needs a length and a record for every "
            "position below it, as ArraySource has; a generator can be read once only"
        )
    for name, array in source.fields.items() if isinstance(source, data.ArraySource) else ():
        check_numbers(name, array, 0)


def check_tokens(
    model: nnx.Module, source: data.AnySource, used_N: np.ndarray | None = None
) -> None:
    """Raises DataError, with the ids, for examples with tokens outside of the model's vocabulary.

    Args:
      model: the model; it is not checked if it has no `config.vocab`.
      source: the data; only packed text is checked.
      used_N: bool by example id: the examples to check; default: all.
    """
    vocab = getattr(getattr(model, "config", None), "vocab", None)
    if isinstance(source, data.PackedSource) and isinstance(vocab, int):
        text.check_vocabulary(source.examples, vocab, used_N)


def check_finite(name: str, step: int, state: TrainState) -> None:
    """Checks that a state is finite before it is saved, because training would resume from it.

    Raises:
      TrainingError: some values are not finite; the message names their arrays.
    """
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_is_finite(state)))
    bad = [jax.tree_util.keystr(path) for path, finite in leaves if not finite]
    if bad:
        raise TrainingError(
            f"{name}: NaN or infinite values after step {step} in {', '.join(bad[:5])}"
            f"{' ...' if len(bad) > 5 else ''}, which is not saved. Training diverged: lower the "
            "learning rate"
        )


@jax.jit
def _is_finite(tree: Any) -> Any:
    inexact = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.inexact), tree)
    return jax.tree.map(lambda x, check: jnp.isfinite(x).all() if check else True, tree, inexact)
