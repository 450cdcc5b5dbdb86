"""The loaders: orders, weights, positions and reading at once."""

import itertools

import numpy as np
import pytest

from easy_jax.data import ArraySource, DataError, Reading, scoring_loader, training_loader

SIZES = (1, 7, 8, 65)
BATCH_SIZES = (8, 16)
PROCESS_COUNTS = (1, 2, 4)
GRID = list(itertools.product(SIZES, BATCH_SIZES))


def squares(size):
    """Record i holds i squared, so that a record cannot be taken for another."""
    return ArraySource({"x": np.arange(size, dtype=np.float32) ** 2})


def global_batches(make, processes, batch_size):
    """The batches of all processes, their rows joined in the order of the processes."""
    loaders = [make(rows=rows) for rows in np.split(np.arange(batch_size), processes)]
    assert len({loader.steps for loader in loaders}) == 1
    rounds = list(zip(*map(iter, loaders), strict=True))
    assert len(rounds) == loaders[0].steps
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in rounds
    ]


def real_ids(batches):
    return np.concatenate([batch["example_id"][batch["mask"]] for batch in batches])


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# The order for scoring.


@pytest.mark.parametrize("processes", PROCESS_COUNTS)
@pytest.mark.parametrize(("size", "batch_size"), GRID)
def test_scoring_order_has_every_example_once(size, batch_size, processes):
    batches = global_batches(
        lambda **p: scoring_loader(squares(size), batch_size, **p), processes, batch_size
    )
    ids = np.concatenate([batch["example_id"] for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    x = np.concatenate([batch["x"] for batch in batches])
    expected = list(range(size)) + [-1] * (-size % batch_size)
    assert ids.tolist() == expected
    assert mask.tolist() == [i >= 0 for i in expected]
    assert x[mask].tolist() == [i**2 for i in range(size)]
    assert all(len(batch["x"]) == batch_size for batch in batches)
    assert "weight" not in batches[0]


def test_scoring_order_of_chosen_ids():
    batches = list(scoring_loader(squares(20), 8, ids=np.array([3, 5, 19])))
    assert len(batches) == 1
    assert batches[0]["example_id"].tolist() == [3, 5, 19] + [-1] * 5
    assert batches[0]["x"][:3].tolist() == [9, 25, 361]


def test_ids_outside_of_the_data_set_are_named():
    with pytest.raises(DataError, match=r"ids \[-1, 20\] are not in \[0, 20\)"):
        scoring_loader(squares(20), 8, ids=np.array([-1, 3, 20]))


# The order for training.


@pytest.mark.parametrize("processes", PROCESS_COUNTS)
@pytest.mark.parametrize(("size", "batch_size"), GRID)
def test_training_sees_every_example_once_an_epoch(size, batch_size, processes):
    epochs = 3
    batches = global_batches(
        lambda **p: training_loader(squares(size), batch_size, epochs=epochs, seed=5, **p),
        processes,
        batch_size,
    )
    ids = real_ids(batches)
    # Epochs follow one another without a gap, so each is a slice of the whole order.
    for epoch in range(epochs):
        assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert len(ids) == epochs * size
    assert all(batch["mask"].all() for batch in batches[:-1])
    last = batches[-1]
    assert (last["example_id"][~last["mask"]] == -1).all()
    assert (last["weight"][~last["mask"]] == 0).all()
    for batch in batches:
        mask = batch["mask"]
        np.testing.assert_array_equal(batch["x"][mask], batch["example_id"][mask] ** 2)
        np.testing.assert_array_equal(batch["weight"][mask], 1.0)


@pytest.mark.parametrize(("size", "batch_size"), GRID)
def test_global_batches_do_not_depend_on_the_number_of_processes(size, batch_size):
    def batches(processes):
        return global_batches(
            lambda **p: training_loader(squares(size), batch_size, epochs=2, seed=1, **p),
            processes,
            batch_size,
        )

    alone = batches(1)
    for processes in PROCESS_COUNTS[1:]:
        # Padding holds a copy of some record, which may differ; nothing else may.
        for a, b in zip(alone, batches(processes), strict=True):
            np.testing.assert_array_equal(a["example_id"], b["example_id"])
            np.testing.assert_array_equal(a["mask"], b["mask"])
            np.testing.assert_array_equal(a["weight"], b["weight"])
            np.testing.assert_array_equal(a["x"][a["mask"]], b["x"][b["mask"]])


def test_order_is_fixed_by_the_seed():
    def order(seed):
        return real_ids(training_loader(squares(65), 8, epochs=2, seed=seed)).tolist()

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert order(3)[:65] != order(3)[65:]
    assert order(3)[:65] != order(3)[65:]
    assert order(3)[:65] != list(range(65))


def test_position_can_be_saved_and_restored_in_the_middle_of_an_epoch():
    loader = training_loader(squares(65), 8, epochs=3, seed=2)
    for taken in (0, 3, 11, loader.steps):
        batches = iter(loader)
        for _ in range(taken):
            next(batches)
        state = batches.get_state()
        rest = list(batches)
        assert len(rest) == loader.steps - taken
        fresh = iter(training_loader(squares(65), 8, epochs=3, seed=2))
        fresh.set_state(state)
        assert_same_batches(list(fresh), rest)


def test_position_does_not_depend_on_reading_ahead():
    loaders = [
        training_loader(squares(65), 8, epochs=1, seed=2, reading=reading)
        for reading in (Reading(threads=1, prefetch=1), Reading(threads=4, prefetch=16))
    ]
    first, second = map(iter, loaders)
    for _ in range(4):
        next(first)
    second.set_state(first.get_state())
    assert_same_batches(list(second), list(first))


# Weights.


@pytest.mark.parametrize("processes", PROCESS_COUNTS)
def test_weights_are_joined_by_id(processes):
    weight_N = np.random.default_rng(0).random(65).astype(np.float32)
    batches = global_batches(
        lambda **p: training_loader(squares(65), 16, epochs=2, seed=0, weight_N=weight_N, **p),
        processes,
        16,
    )
    for batch in batches:
        expected = [weight_N[i] if i >= 0 else 0.0 for i in batch["example_id"]]
        np.testing.assert_array_equal(batch["weight"], np.float32(expected))


@pytest.mark.parametrize("given", [False, True])
def test_weights_of_the_records_are_multiplied_in(given):
    own_N = np.arange(10, dtype=np.float32)
    weight_N = np.linspace(0.1, 1.0, 10, dtype=np.float32) if given else None
    source = ArraySource({"x": np.zeros(10, np.float32), "weight": own_N})
    factor_N = np.ones(10, np.float32) if weight_N is None else weight_N
    for batch in training_loader(source, 8, epochs=1, seed=0, weight_N=weight_N):
        expected = [own_N[i] * factor_N[i] if i >= 0 else 0.0 for i in batch["example_id"]]
        np.testing.assert_array_equal(batch["weight"], np.float32(expected))


def test_weights_of_the_records_do_not_reach_scoring():
    source = ArraySource({"x": np.zeros(3, np.float32), "weight": np.ones(3, np.float32)})
    (batch,) = scoring_loader(source, 8)
    assert sorted(batch) == ["example_id", "mask", "x"]


def test_an_example_without_a_weight_is_left_out():
    weight_N = np.ones(20, np.float32)
    weight_N[[4, 7]] = np.nan
    ids = real_ids(training_loader(squares(20), 8, epochs=2, seed=0, weight_N=weight_N))
    expected = [i for i in range(20) if i not in (4, 7)]
    assert sorted(ids.tolist()) == sorted(expected * 2)


def test_an_example_of_weight_zero_stays():
    weight_N = np.ones(20, np.float32)
    weight_N[4] = 0.0
    ids = real_ids(training_loader(squares(20), 8, epochs=1, seed=0, weight_N=weight_N))
    assert sorted(ids.tolist()) == list(range(20))


# Sources.


class BatchSource:
    """Can be read only by the batch."""

    def __init__(self, size):
        self.size = size
        self.calls = []

    def __len__(self):
        return self.size

    def __getitem__(self, position):
        raise AssertionError(f"example {position} was read alone")

    def __getitems__(self, positions):
        self.calls.append(list(positions))
        return [{"x": np.float32(position)} for position in positions]


def test_batches_are_read_at_once_where_the_source_can():
    source = BatchSource(9)
    batches = list(scoring_loader(source, 8))
    assert [batch["x"][batch["mask"]].tolist() for batch in batches] == [
        list(map(float, range(8))),
        [8.0],
    ]
    assert len(source.calls) == 2
    # Padding is a copy of an example of the batch: no other example is read for it.
    assert {position for call in source.calls for position in call} == set(range(9))


@pytest.mark.parametrize("size", SIZES)
def test_the_ids_in_the_rows_of_a_process_are_those_it_is_given(size):
    for rows in np.split(np.arange(8), 4):
        loader = scoring_loader(squares(size), 8, rows=rows)
        given = np.concatenate([batch["example_id"][batch["mask"]] for batch in loader])
        assert loader.ids_in(rows, 8).tolist() == sorted(given.tolist())
