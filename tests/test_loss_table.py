"""The loss table: exact statistics, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from easy_jax.train import loss_parts, loss_table
from easy_jax.train.loss_table import LossTable, LossTableError

# Exact order statistics.


def chunked(values, size):
    return lambda: iter([values[i : i + size] for i in range(0, len(values), size)])


def random_losses(kind, size):
    rng = np.random.default_rng(size)
    values = {
        "uniform": lambda: rng.random(size),
        "duplicates": lambda: rng.integers(4, size=size) / 3,
        "zeros": lambda: np.where(rng.random(size) < 0.7, 0.0, rng.random(size)),
        "minus zeros": lambda: np.where(rng.random(size) < 0.5, -0.0, rng.integers(2, size=size)),
        "denormals": lambda: rng.integers(1, 1000, size=size) * 1e-42,
        "huge": lambda: rng.random(size) * 3.4e38,
        "every scale": lambda: np.exp(rng.uniform(-100, 88, size=size)),
        "close": lambda: 1.0 + rng.integers(8, size=size) * 2.0**-23,
    }
    return values[kind]().astype(np.float32)


KINDS = (
    "uniform",
    "duplicates",
    "zeros",
    "minus zeros",
    "denormals",
    "huge",
    "every scale",
    "close",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 100, 1001])
def test_order_statistics_are_exact(kind, size):
    values = random_losses(kind, size)
    expected = np.sort(values).tolist()
    ranks = sorted({0, size // 3, (size - 1) // 2, size // 2, size - 1})
    for chunk in (1, 7, size):
        if size // chunk > 200:
            continue
        found = loss_table.order_statistics(chunked(values, chunk), ranks)
        assert found == [expected[rank] for rank in ranks]


@pytest.mark.slow
@settings(deadline=None, max_examples=30, database=None)
@given(
    values=hnp.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.floats(0, float(np.finfo(np.float32).max), width=32),
    ),
    data=st.data(),
)
def test_order_statistics_are_exact_for_any_values(values, data):
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=5))
    chunk = data.draw(st.integers(1, len(values)))
    found = loss_table.order_statistics(chunked(values, chunk), ranks)
    assert found == [float(np.partition(values, rank)[rank]) for rank in ranks]


# Tables written by hand.


def write_table(directory, losses, cuts=(), *, order=None, dropped=()):
    """A table of `losses`, its rows in `order`, cut into parts by turns of two processes."""
    directory.mkdir()
    size = len(losses) + len(dropped)
    ids = np.array([i for i in range(size) if i not in dropped])
    order = np.arange(len(ids)) if order is None else order
    for number, rows in enumerate(np.split(order, list(cuts))):
        part = (ids[rows], losses[rows], np.ones(len(rows), np.float32))
        loss_parts.write_part(directory, number % 2, part)
    metadata = {
        "format_version": loss_table.FORMAT_VERSION,
        "num_examples": size,
        "complete": True,
        "dropped_ids": list(dropped),
        **loss_table.summarise(directory),
    }
    metadata["losses"] = LossTable(directory, metadata).fingerprint()
    loss_table.write_metadata(directory, metadata)
    return LossTable.open(directory)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge"])
@pytest.mark.parametrize(("size", "cuts"), [(1, ()), (2, (1,)), (100, (3, 50)), (101, (100,))])
def test_median_and_quantiles_are_exact(kind, size, cuts, tmp_path):
    losses = random_losses(kind, size)
    table = write_table(tmp_path / "t", losses, cuts)
    assert table.temperature == float(np.median(losses))
    assert table.metadata["num_rows"] == size
    for q, value in table.metadata["quantiles"].items():
        assert value == float(np.quantile(losses, float(q), method="nearest"))
    assert list(table.metadata["quantiles"]) == ["0.0", "0.1", "0.25", "0.5", "0.75", "0.9", "1.0"]


def test_median_of_huge_losses(tmp_path):
    losses = np.float32([1e38, 3e38, 3.2e38, 3.4e38])
    table = write_table(tmp_path / "t", losses)
    assert table.temperature == float(np.float32((float(losses[1]) + float(losses[2])) / 2))


def test_fingerprint_does_not_depend_on_the_parts(tmp_path):
    losses = random_losses("uniform", 50)
    backwards = np.arange(50)[::-1]
    tables = [
        write_table(tmp_path / "whole", losses),
        write_table(tmp_path / "cut", losses, (5, 6, 40)),
        write_table(tmp_path / "backwards", losses, (20,), order=backwards),
    ]
    assert len({table.fingerprint() for table in tables}) == 1
    for table in tables:
        np.testing.assert_array_equal(table.loss_N(), losses)
    losses[17] = np.nextafter(losses[17], np.float32(2))
    other = write_table(tmp_path / "other", losses)
    assert other.fingerprint() != tables[0].fingerprint()


@pytest.mark.slow
def test_dropped_examples_have_no_loss_and_no_weight(tmp_path):
    losses = random_losses("uniform", 11)
    table = write_table(tmp_path / "t", losses, (4,), dropped=(0, 5, 12))
    kept = np.isin(np.arange(14), [0, 5, 12], invert=True)
    assert table.num_examples == 14
    for array in (table.loss_N(), table.flow_weights()):
        np.testing.assert_array_equal(np.isnan(array), ~kept)
    np.testing.assert_array_equal(table.loss_N()[kept], losses)
    assert table.temperature == float(np.median(losses))


@pytest.mark.slow
@pytest.mark.parametrize("tau", [None, 0.3, 50.0])
def test_flow_weights_in_float64(tau, tmp_path):
    losses = np.random.default_rng(0).exponential(2.0, 101).astype(np.float32)
    weight_N = write_table(tmp_path / "t", losses, (30, 31)).flow_weights(tau)
    assert weight_N.dtype == np.float32
    loss_N = losses.astype(np.float64)
    expected = np.exp(-loss_N / (np.median(loss_N) if tau is None else tau))
    np.testing.assert_allclose(weight_N, expected, rtol=2e-5, atol=1e-38)


def test_open_refuses_what_is_not_a_complete_table(tmp_path):
    with pytest.raises(LossTableError, match="no loss table"):
        LossTable.open(tmp_path)
    table = write_table(tmp_path / "t", random_losses("uniform", 10), (5,))
    metadata = table.metadata
    loss_table.write_metadata(table.directory, {**metadata, "complete": False})
    with pytest.raises(LossTableError, match="is incomplete; run the scoring again"):
        LossTable.open(table.directory)
    loss_table.write_metadata(table.directory, {**metadata, "format_version": 99})
    with pytest.raises(LossTableError, match="format version 99"):
        LossTable.open(table.directory)
    loss_table.write_metadata(table.directory, {**metadata, "num_examples": 12})
    with pytest.raises(LossTableError, match=r"no row for 2 of 12 examples, ids \[10, 11\]"):
        LossTable.open(table.directory)


def test_open_leaves_out_a_part_whose_writing_was_interrupted(tmp_path):
    table = write_table(tmp_path / "t", random_losses("uniform", 10))
    (table.directory / "part-00000-00001.tmp").write_bytes(b"PAR1 cut short")
    np.testing.assert_array_equal(LossTable.open(table.directory).loss_N(), table.loss_N())


def test_tokens_that_stand_twice_count_once(tmp_path):
    rows = (np.array([0, 1, 2]), np.float32([1, 2, 3]), np.float32([1, 2, 1]))
    tokens = [np.float32([1]), np.float32([1, 3]), np.float32([3])]
    for process in (0, 1):
        loss_parts.write_part(tmp_path, process, rows, tokens)
    read = [(ids.tolist(), lists) for ids, lists in loss_parts.iter_token_losses(tmp_path)]
    assert [ids for ids, _ in read] == [[0, 1, 2]]
    assert [values.tolist() for values in read[0][1]] == [[1], [1, 3], [3]]
    summary = loss_table.summarise(tmp_path, token_losses=True)
    assert (summary["num_rows"], summary["num_tokens"]) == (3, 4)
    assert (summary["median"], summary["token_median"]) == (2.0, 2.0)


@pytest.mark.parametrize("field", ["loss", "count", "token_losses"])
def test_rows_that_stand_twice_and_differ_are_named(tmp_path, field):
    for process in (0, 1):
        values = {"loss": [1, 2, 3], "count": [1, 2, 1], "token_losses": [[1], [1, 3], [3]]}
        if process == 1:
            values[field][1] = [1, 2] if field == "token_losses" else 7
        tokens = [np.float32(each) for each in values["token_losses"]]
        rows = np.array([0, 1, 2]), np.float32(values["loss"]), np.float32(values["count"])
        loss_parts.write_part(tmp_path, process, rows, tokens)
    with pytest.raises(LossTableError, match=r"ids with different losses: \[1\]; delete it"):
        loss_parts.seen_ids(tmp_path, 3)
