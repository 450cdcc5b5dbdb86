"""Weights of examples and tokens that come with the text."""

from decimal import Decimal

import numpy as np
import pytest
from test_text_warnings import OPTIONS, quiet, words

from easy_jax.data import DataError, PackedSource, TokenSource, training_loader
from easy_jax.data.text import tokenize


def test_weights_are_multiplied_into_those_of_training():
    source = quiet(["a"] * 4, ["b"] * 4, words(), weights=[5, 0.0, 1, 0.25], **OPTIONS)
    assert source.weight.tolist() == [5, 0, 1, 0.25] and source.weight.dtype == np.float32
    assert source.describe().endswith("; own weights from 0 to 5")
    plain = quiet(["a"] * 4, ["b"] * 4, words(), **OPTIONS)
    assert plain.weight is None and plain.fingerprint() != source.fingerprint()
    for given, expected in ((None, [5, 0, 1, 0.25]), ([0.5, 1, 3, 4], [2.5, 0, 3, 1])):
        loader = training_loader(
            PackedSource(source, row_length=8),
            1,
            epochs=1,
            seed=0,
            weight_N=None if given is None else np.array(given, np.float32),
        )
        found = {}
        for batch in loader:
            ids, weights = (batch[name][batch["mask"]] for name in ("example_id", "weight"))
            found |= zip(ids.tolist(), weights.tolist(), strict=True)
        assert [found[i] for i in range(4)] == expected
    with pytest.raises(DataError, match="nothing to train on: all 4 weights are 0"):
        training_loader(
            PackedSource(source, row_length=8), 1, epochs=1, seed=0, weight_N=np.eye(4)[1]
        )


@pytest.mark.parametrize(
    "weight", [None, "1", True, -1, float("nan"), float("inf"), [1], 10**400, Decimal("NaN")]
)
def test_bad_weights(weight):
    with pytest.raises(
        DataError, match=r"weight is not a finite number of at least 0 \(1\): id 1 \["
    ):
        tokenize(["a"] * 2, ["b"] * 2, words(), weights=[1, weight], **OPTIONS)


def test_decimals_are_weights_and_what_float32_makes_0_is_none():
    decimals = [Decimal("0.25"), Decimal(0)]
    options = {"token_weights": [[w, 1] for w in decimals], **OPTIONS}  # a word, and EOS
    source = quiet(["a"] * 2, ["b"] * 2, words(), weights=decimals, **options)
    assert source.weight.tolist() == [0.25, 0]
    assert source.token_weight.values.tolist() == [0.25, 1, 0, 1]
    small = "not 0, but too small for float32"
    for given in (
        {"weights": [1, 1e-50]},
        {"weights": [1, Decimal("1e-39")]},
        {"token_weights": [[1, 1], [1, 1e-50]]},
    ):
        name = "a token weight" if "token_weights" in given else "weight"
        with pytest.raises(DataError, match=rf"{name} is {small} \(1\): id 1 \["):
            tokenize(["a"] * 2, ["b"] * 2, words(), **given, **OPTIONS)
    with pytest.raises(DataError, match=rf"ids \[1\]: the weight is {small}"):
        TokenSource([1] * 4, [0, 2, 4], [1, 1], weight=[1, 1e-50])
