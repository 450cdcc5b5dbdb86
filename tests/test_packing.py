"""Packed rows and their batches: what is in them, and what is refused."""

import numpy as np
import packed
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import SIZE, SOURCES

from easy_jax.data import (
    ArraySource,
    DataError,
    PackedSource,
    Ragged,
    TokenSource,
    scoring_loader,
    training_loader,
)
from easy_jax.data.packing import PackedRows, split_tokens

# Rows.


@settings(deadline=None, max_examples=40, database=None)
@given(
    lengths=st.lists(st.integers(2, 21), min_size=1, max_size=60),
    spare=st.integers(0, 30),
    max_segments=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_rows_have_every_id_once_and_fit(lengths, spare, max_segments, seed):
    source = PackedSource(packed.of_lengths(lengths), max(lengths) - 1 + spare, max_segments)
    ids = np.random.default_rng(seed).permutation(len(lengths))
    rows = source.rows(ids)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    taken = np.array(lengths) - 1
    place = np.argsort(ids)
    for row in rows:
        assert len(row) > 0 and taken[row].sum() <= source.row_length
        assert max_segments == 0 or len(row) <= max_segments
        assert (np.diff(place[row]) > 0).all()  # in the order given
    if max_segments == 1:
        assert [row.tolist() for row in rows] == [[i] for i in ids]
    again = source.rows(ids)
    assert [row.tolist() for row in again] == [row.tolist() for row in rows]


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(2, 13, 500)
    rows = PackedSource(packed.of_lengths(lengths), 48).rows(np.arange(500))
    assert len(rows) <= 1.1 * np.ceil((lengths - 1).sum() / 48)


# Batches.


def _three_examples():
    tokens = [10, 11, 12, 13, 20, 21, 22, 30, 31, 32, 33, 34, 35]
    return PackedSource(TokenSource(tokens, [0, 4, 7, 13], [2, 1, 4]), row_length=6)


def test_a_batch_by_hand():
    batches = list(scoring_loader(_three_examples(), 3))
    assert len(batches) == 1
    expected = {
        "tokens": [[10, 11, 12, 20, 21, 0], [30, 31, 32, 33, 34, 0], [0] * 6],
        "targets": [[-1, 12, 13, 21, 22, -1], [-1, -1, -1, 34, 35, -1], [-1] * 6],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0], [0] * 6],
        "positions": [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0], [0] * 6],
        "example_id": [[0, 1], [2, -1], [-1, -1]],
        "mask": [[True, True], [True, False], [False, False]],
    }
    assert {name: array.tolist() for name, array in batches[0].items()} == expected
    kinds = {"example_id": np.int64, "mask": np.bool_}
    for name, array in batches[0].items():
        assert array.dtype == kinds.get(name, np.int32), name


def test_weights_of_a_batch_by_hand():
    weight_N = np.float32([0.5, 2.0, 0.25])
    (batch,) = training_loader(_three_examples(), 4, epochs=1, seed=0, weight_N=weight_N)
    for i, weight, mask in zip(
        batch["example_id"].ravel(), batch["weight"].ravel(), batch["mask"].ravel(), strict=True
    ):
        assert (weight, mask) == ((weight_N[i], True) if i >= 0 else (0.0, False))
    assert batch["weight"].dtype == np.float32 and batch["mask"].sum() == 3

    source = _three_examples()
    ragged = Ragged(np.arange(1, 7, dtype=np.float32), np.array([0, 2, 4, 6]))
    batch = PackedRows(source, 2, {"token_weight": ragged}).read([np.array([1, 0]), np.array([2])])
    assert batch["token_weight"].tolist() == [[3, 4, 0, 1, 2, 0], [0, 0, 0, 5, 6, 0]]
    assert batch["example_id"].tolist() == [[1, 0], [2, -1]]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_targets_of_a_batch_are_the_examples(kind):
    examples, seen = packed.examples(), []
    loader = training_loader(SOURCES[kind](), 4, epochs=2, seed=7)
    batches = list(loader)
    assert loader.steps == len(batches)
    for batch in batches:
        ids = batch["example_id"][batch["mask"]]
        for i, targets in zip(ids, split_tokens(batch, batch["targets"]), strict=True):
            record = examples[i]
            np.testing.assert_array_equal(targets, record["tokens"][record["target_start"] :])
        seen += ids.tolist()
    assert sorted(seen) == sorted(2 * list(range(SIZE)))
    assert sorted(seen[:SIZE]) == list(range(SIZE))  # one epoch after the other


def test_processes_share_the_global_batches():
    options = {"epochs": 2, "seed": 3, "weight_N": packed.weights()}
    whole = list(training_loader(packed.source(), 4, **options))
    parts = [
        list(training_loader(packed.source(), 4, rows=rows, **options))
        for rows in np.split(np.arange(4), 2)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            joined = np.concatenate([share[name] for share in shares])
            np.testing.assert_array_equal(joined, array)


# What is refused.


def test_bad_rows_are_refused():
    with pytest.raises(DataError, match=r"2 examples do not fit into a row of 6 .*ids \[1, 3\]"):
        PackedSource(packed.of_lengths([7, 8, 3, 9]), 6)
    assert len(PackedSource(packed.of_lengths([7]), 6)) == 1  # its last token is no input
    with pytest.raises(DataError, match="row_length is 0"):
        PackedSource(packed.of_lengths([3]), 0)
    with pytest.raises(DataError, match="max_segments -1"):
        PackedSource(packed.of_lengths([3]), 4, -1)


def test_bad_weights_are_refused():
    source = _three_examples()
    offsets = np.array([0, 2, 4, 6])
    good = np.ones(6, np.float32)
    with pytest.raises(DataError, match="offsets must go up from 0 to 6"):
        Ragged(good, offsets[:3])
    with pytest.raises(DataError, match="offsets must go up from 0 to 6"):
        Ragged(good, np.array([0, 4, 2, 6]))
    with pytest.raises(DataError, match="token weights for 2 of 3 examples"):
        packed.load(source, token_weight=Ragged(good[:4], offsets[:3]))
    with pytest.raises(DataError, match=r"differs .* in 2 examples, ids \[0, 1\]"):
        packed.load(source, token_weight=Ragged(good, np.array([0, 1, 4, 6])))
    for value in (-1.0, np.nan, np.inf):
        bad = good.copy()
        bad[3] = value
        with pytest.raises(DataError, match=r"negative or not finite in example ids \[1\]"):
            packed.load(source, token_weight=Ragged(bad, offsets))
    half = Ragged(np.float32([1, 1, 0, 0, 0, 0]), offsets)  # of the first example alone
    for weight_N in ([0, 1, 1], [np.nan, 1, 1]):
        with pytest.raises(DataError, match=r"token weights, times their example's, are 0"):
            packed.load(source, weight_N=np.float32(weight_N), token_weight=half)
    assert packed.load(source, weight_N=np.float32([1, 0, 0]), token_weight=half).steps > 0
    unpacked = ArraySource({"x": np.zeros(3, np.float32)})
    with pytest.raises(DataError, match="token weights are for packed text"):
        packed.load(unpacked, token_weight=Ragged(good, offsets))
    with pytest.raises(DataError, match=r"\(2,\) weights for 3 examples"):
        packed.load(source, weight_N=np.ones(2))
    with pytest.raises(DataError, match=r"negative or infinite for 1 examples, ids \[2\]"):
        packed.load(source, weight_N=np.float32([1, 0, -1]))
    with pytest.raises(DataError, match="every weight is missing"):
        packed.load(source, weight_N=np.full(3, np.nan))
    with pytest.raises(DataError, match=r"duplicate example ids: \[1\]"):
        scoring_loader(source, 4, ids=np.array([0, 1, 1]))
    with pytest.raises(DataError, match=r"\[3\] are not in \[0, 3\)"):
        scoring_loader(source, 4, ids=np.array([0, 3]))


def test_an_example_without_a_weight_is_left_out():
    weight_N = packed.weights()
    weight_N[[4, 17]] = np.nan
    kept = [i for i in range(SIZE) if i not in (4, 17)]
    assert packed.ids(packed.load(packed.source(), weight_N=weight_N)) == kept
    # The same for an example dropped while scoring, which has no token weights.
    full = packed.token_weights(packed.examples())
    parts = [full[i] if i in kept else full[i][:0] for i in range(SIZE)]
    ragged = Ragged(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))
    assert packed.ids(packed.load(packed.source(), weight_N=weight_N, token_weight=ragged)) == kept
    assert packed.ids(packed.load(packed.source(), token_weight=ragged)) == kept
