"""Scoring into a loss table: every example once, interruptions, bad examples, compilations."""

import json
import shutil

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import devices_mesh

from easy_jax.core.losses import squared_error
from easy_jax.data import ArraySource, training_loader
from easy_jax.io import code_fingerprint
from easy_jax.models.modes import eval_mode, train_mode
from easy_jax.parallel import sharding
from easy_jax.train import forward, loss_parts, loss_table
from easy_jax.train.loss_table import LossTable, LossTableError
from easy_jax.train.scoring import ScoringError, score

# Scoring end to end.

FEATURES, OUTPUTS = 3, 2


def make_model(seed=0):
    return nnx.Linear(FEATURES, OUTPUTS, rngs=nnx.Rngs(seed))


def make_arrays(size):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(size, FEATURES)).astype(np.float32)
    return {"x": x, "y": rng.normal(size=(size, OUTPUTS)).astype(np.float32)}


def regress(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def float64_losses(model, arrays):
    kernel, bias = (np.asarray(p[...], np.float64) for p in (model.kernel, model.bias))
    return np.square(arrays["x"].astype(np.float64) @ kernel + bias - arrays["y"]).sum(axis=1)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [8, 16])
@pytest.mark.parametrize("size", [1, 7, 8, 65])
def test_every_example_is_scored_once(size, batch_size, devices, tmp_path):
    model, arrays = make_model(), make_arrays(size)
    counts = []
    table = score(
        model,
        ArraySource(arrays),
        tmp_path,
        loss_fn=regress,
        batch_size=batch_size,
        mesh=devices_mesh(devices),
        rows_per_part=10,
        progress=counts.append,
    )
    ids, loss, count = (np.concatenate(column) for column in zip(*table.rows(), strict=True))
    assert sorted(ids.tolist()) == list(range(size))
    assert sum(counts) == size
    np.testing.assert_array_equal(count, 1.0)
    np.testing.assert_allclose(loss, float64_losses(model, arrays)[ids], rtol=1e-5, atol=1e-6)
    assert table.temperature == float(np.median(loss))


def test_scoring_with_a_sharded_model(tmp_path):
    axes = {"logical_axes": ("features", "classes")}
    model = nnx.Linear(8, OUTPUTS, kernel_metadata=axes, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(20, 8)).astype(np.float32),
        "y": rng.normal(size=(20, OUTPUTS)).astype(np.float32),
    }
    one, eight = (
        score(model, ArraySource(arrays), tmp_path / name, loss_fn=regress, batch_size=8, mesh=mesh)
        for name, mesh in (("one", devices_mesh(1)), ("eight", devices_mesh(8, fsdp=4)))
    )
    for table in (one, eight):
        np.testing.assert_allclose(table.loss_N(), float64_losses(model, arrays), rtol=1e-5)
    assert one.metadata["model"] == eight.metadata["model"]


def test_loss_is_the_mean_over_the_tokens(tmp_path):
    def sums(model, batch):
        del model
        return batch["nll"], batch["tokens"]

    arrays = {"nll": np.float32([6, 5, 0]), "tokens": np.float32([3, 1, 2])}
    table = score(make_model(), ArraySource(arrays), tmp_path, loss_fn=sums, batch_size=8)
    assert table.loss_N().tolist() == [2.0, 5.0, 0.0]
    ((_, _, count),) = table.rows()
    assert count.tolist() == [3.0, 1.0, 2.0]


# Interruption.


class CountingSource:
    """Remembers what was read; breaks at `limit` reads."""

    def __init__(self, arrays, limit=None):
        self.source = ArraySource(arrays)
        self.limit = limit
        self.read = []

    def __len__(self):
        return len(self.source)

    def __getitem__(self, position):
        if self.limit is not None and len(self.read) >= self.limit:
            raise OSError("the disk is gone")
        self.read.append(position)
        return self.source[position]

    def fingerprint(self):
        return self.source.fingerprint()


OPTIONS = {"loss_fn": regress, "batch_size": 8, "rows_per_part": 8}


def interrupt(directory, arrays, limit):
    """Scores until the source breaks; the ids whose rows were saved."""
    with pytest.raises(OSError, match="the disk is gone"):
        score(make_model(), CountingSource(arrays, limit), directory, **OPTIONS)
    # A table begins with its first batch.
    with pytest.raises(LossTableError, match="incomplete" if limit else "no loss table"):
        LossTable.open(directory)
    return {int(i) for ids, _, _ in loss_parts.iter_rows(directory) for i in ids}


def assert_same_tables(ours, theirs):
    np.testing.assert_array_equal(ours.loss_N(), theirs.loss_N())
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.metadata == theirs.metadata


@pytest.mark.parametrize("limit", [0, 20, 45])
def test_interrupted_scoring_continues_at_the_missing_rows(limit, tmp_path):
    arrays = make_arrays(65)
    whole = score(make_model(), ArraySource(arrays), tmp_path / "whole", **OPTIONS)
    saved = interrupt(tmp_path / "broken", arrays, limit)
    assert saved == set(range(len(saved)))
    assert saved or limit < 45
    source = CountingSource(arrays)
    table = score(make_model(), source, tmp_path / "broken", **OPTIONS)
    missing = [i for i in range(65) if i not in saved]
    assert sorted(source.read) == missing  # each once: padding is not read
    assert_same_tables(table, whole)


def test_interrupted_scoring_continues_after_a_damaged_part_was_deleted(tmp_path):
    # What the error message about a damaged part says to do.
    arrays = make_arrays(65)
    whole = score(make_model(), ArraySource(arrays), tmp_path / "whole", **OPTIONS)
    interrupt(tmp_path / "broken", arrays, 64)
    parts = sorted((tmp_path / "broken").glob("part-*.parquet"))
    assert len(parts) >= 2
    parts[0].write_bytes(b"")
    with pytest.raises(LossTableError, match="is damaged"):
        score(make_model(), ArraySource(arrays), tmp_path / "broken", **OPTIONS)
    parts[0].unlink()
    table = score(make_model(), ArraySource(arrays), tmp_path / "broken", **OPTIONS)
    assert_same_tables(table, whole)


def test_interrupted_scoring_is_refused_for_another_model(tmp_path):
    arrays = make_arrays(65)
    interrupt(tmp_path, arrays, 45)
    with pytest.raises(LossTableError, match="model is '"):
        score(make_model(seed=1), ArraySource(arrays), tmp_path, **OPTIONS)


def test_rows_without_metadata_are_refused(tmp_path):
    arrays = make_arrays(65)
    interrupt(tmp_path, arrays, 45)
    (tmp_path / "metadata.json").unlink()
    content = sorted(tmp_path.iterdir())
    with pytest.raises(LossTableError, match=r"part-00000-00000.parquet is there, but no metadata"):
        score(make_model(), ArraySource(arrays), tmp_path, **OPTIONS)
    assert sorted(tmp_path.iterdir()) == content


def test_a_table_that_loses_rows_is_not_completed(tmp_path):
    def lose(_):
        (tmp_path / "part-00000-00000.parquet").unlink(missing_ok=True)

    arrays = make_arrays(65)
    with pytest.raises(LossTableError, match=r"no row for \d+ of 65 examples.* run the scoring"):
        score(make_model(), ArraySource(arrays), tmp_path, progress=lose, **OPTIONS)
    assert not loss_table.read_metadata(tmp_path)["complete"]
    table = score(make_model(), ArraySource(arrays), tmp_path, **OPTIONS)
    assert table.temperature == float(np.median(table.loss_N()))


def test_complete_table_is_not_scored_again(tmp_path):
    arrays = make_arrays(20)
    first = score(make_model(), ArraySource(arrays), tmp_path, **OPTIONS)
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    source = CountingSource(arrays)
    again = score(make_model(), source, tmp_path, **OPTIONS)
    assert source.read == []
    assert_same_tables(again, first)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content


# Eval mode, bad examples, compilation.


class NormThenLinear(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(FEATURES, epsilon=1e-5, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.linear = nnx.Linear(FEATURES, OUTPUTS, rngs=nnx.Rngs(2))
        self.norm.mean[...] = jnp.array([1.0, -2.0, 0.5])
        self.norm.var[...] = jnp.array([4.0, 0.25, 1.0])

    def __call__(self, x):
        return self.linear(self.dropout(self.norm(x)))


@pytest.mark.parametrize("view", [train_mode, eval_mode])
def test_model_runs_in_eval_mode_and_stays_as_it_is(view, tmp_path):
    model = view(NormThenLinear())
    before = [np.array(leaf) for leaf in variables(model)]
    flags = (model.norm.use_running_average, model.dropout.deterministic)
    arrays = make_arrays(20)
    table = score(model, ArraySource(arrays), tmp_path, loss_fn=regress, batch_size=8)
    mean, var = np.array([1.0, -2.0, 0.5]), np.array([4.0, 0.25, 1.0])
    normalised = {**arrays, "x": (arrays["x"] - mean) / np.sqrt(var + 1e-5)}
    np.testing.assert_allclose(
        table.loss_N(), float64_losses(model.linear, normalised), rtol=1e-5, atol=1e-6
    )
    assert (model.norm.use_running_average, model.dropout.deterministic) == flags
    assert flags == (view is eval_mode,) * 2
    for leaf, old in zip(variables(model), before, strict=True):
        np.testing.assert_array_equal(np.array(leaf), old)


def variables(model):
    kinds = (nnx.Param, nnx.BatchStat)
    return [v[...] for kind in kinds for _, v in nnx.to_flat_state(nnx.state(model, kind))]


def with_count(model, batch):
    loss, _ = regress(model, batch)
    return jnp.where(batch["bad"] == 1, jnp.nan, loss), jnp.where(batch["bad"] == 2, 0.0, 1.0)


def with_bad_examples():
    bad = np.zeros(20, np.int32)
    bad[[3, 12]], bad[19] = 1, 2
    return {**make_arrays(20), "bad": bad}


BAD_OPTIONS = {**OPTIONS, "loss_fn": with_count}


def test_bad_examples_are_dropped_and_counted(tmp_path):
    arrays = with_bad_examples()
    source = ArraySource(arrays)
    table = score(make_model(), source, tmp_path, on_bad_example="drop", **BAD_OPTIONS)
    assert table.metadata["dropped_ids"] == [3, 12, 19]
    assert table.metadata["num_rows"] == 17
    kept = np.isin(np.arange(20), [3, 12, 19], invert=True)
    expected = float64_losses(make_model(), arrays)
    np.testing.assert_allclose(table.loss_N()[kept], expected[kept], rtol=1e-5, atol=1e-6)
    assert np.isnan(table.loss_N()[~kept]).all()
    assert table.temperature == float(np.median(table.loss_N()[kept]))
    loader = training_loader(source, 8, epochs=1, seed=0, weight_N=table.flow_weights())
    ids = np.concatenate([batch["example_id"][batch["mask"]] for batch in loader])
    assert sorted(ids.tolist()) == np.flatnonzero(kept).tolist()


def test_bad_examples_are_an_error_that_lists_them(tmp_path):
    arrays = with_bad_examples()
    message = r"3 of 20 .*id 3 has loss nan; id 12 has loss nan; id 19 has no target token"
    with pytest.raises(ScoringError, match=message):
        score(make_model(), ArraySource(arrays), tmp_path, **BAD_OPTIONS)
    # The good rows were saved: only the bad ones are looked at again.
    source = CountingSource(arrays)
    with pytest.raises(ScoringError, match=message):
        score(make_model(), source, tmp_path, **BAD_OPTIONS)
    assert set(source.read) == {3, 12, 19}
    table = score(make_model(), source, tmp_path, on_bad_example="drop", **BAD_OPTIONS)
    assert table.metadata["dropped_ids"] == [3, 12, 19]


def test_interrupted_dropping_gives_the_same_table(tmp_path):
    arrays = with_bad_examples()
    options = {**BAD_OPTIONS, "on_bad_example": "drop"}
    whole = score(make_model(), ArraySource(arrays), tmp_path / "whole", **options)
    with pytest.raises(OSError, match="the disk is gone"):
        score(make_model(), CountingSource(arrays, 18), tmp_path / "broken", **options)
    table = score(make_model(), ArraySource(arrays), tmp_path / "broken", **options)
    assert_same_tables(table, whole)


def test_metadata_is_plain_json(tmp_path):
    score(make_model(), ArraySource(make_arrays(20)), tmp_path, **OPTIONS)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metadata.json").read_text()
    metadata = json.loads(text, parse_constant=refuse)
    assert {"model", "data", "loss", "num_examples", "median", "quantiles"} <= set(metadata)


@pytest.mark.slow
def test_one_compilation(tmp_path):
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(regress, n=1)
    options = {**OPTIONS, "loss_fn": traced}
    for seed in (0, 1):  # another model of the same structure shares it
        for size in (1, 20, 65):
            source = ArraySource(make_arrays(size))
            score(make_model(seed), source, tmp_path / f"{seed}-{size}", **options)
    graphdef = nnx.graphdef(eval_mode(make_model()))
    step = forward.make_score_step(
        graphdef, traced, sharding.make_mesh(), code_fingerprint.of_function(traced)
    )
    assert step._cache_size() == 1


# Rows that stand twice, as two runs in one directory at once have left them.


def _write_again(directory, name="part-00000-00000.parquet"):
    shutil.copy(directory / name, directory / "part-00001-00000.parquet")


def test_rows_that_stand_twice_and_are_the_same_count_once(tmp_path):
    arrays = make_arrays(65)
    whole = score(make_model(), ArraySource(arrays), tmp_path / "whole", **OPTIONS)
    again = score(make_model(), ArraySource(arrays), tmp_path / "again", **OPTIONS)
    _write_again(again.directory)
    assert sorted(int(i) for ids, _, _ in again.rows() for i in ids) == list(range(65))
    assert_same_tables(LossTable.open(again.directory), whole)
    np.testing.assert_array_equal(again.flow_weights(), whole.flow_weights())


def test_an_interrupted_table_with_rows_twice_is_completed(tmp_path):
    arrays = make_arrays(65)
    whole = score(make_model(), ArraySource(arrays), tmp_path / "whole", **OPTIONS)
    interrupt(tmp_path / "broken", arrays, 45)
    _write_again(tmp_path / "broken")
    table = score(make_model(), ArraySource(arrays), tmp_path / "broken", **OPTIONS)
    assert_same_tables(table, whole)
