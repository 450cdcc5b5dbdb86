"""Scoring and training of packed rows: batches, interruptions, bad tokens."""

import chex
import jax
import numpy as np
import packed
import pytest
from flax import nnx
from helpers import InterruptionError, devices_mesh, stop_after
from packed import SIZE, SOURCES, VOCAB

from easy_jax.config import OptimizerConfig, StageConfig
from easy_jax.core.causal_lm import causal_lm_loss
from easy_jax.data import DataError, TokenSource, scoring_loader, training_loader
from easy_jax.data.packing import split_tokens
from easy_jax.train import loss_parts
from easy_jax.train.fitting import fit
from easy_jax.train.loss_table import LossTable, LossTableError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return packed.score_rows(packed.source(), tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize(
    ("kind", "devices", "batch_size"),
    [("packed", 2, 4), ("packed", 8, 16), ("padded", 2, 16), ("padded", 8, 8)],
)
def test_losses_do_not_depend_on_the_batches(kind, devices, batch_size, table, tmp_path):
    other = packed.score_rows(SOURCES[kind](), tmp_path, devices=devices, batch_size=batch_size)
    np.testing.assert_allclose(other.loss_N(), table.loss_N(), rtol=1e-5)
    np.testing.assert_allclose(
        other.token_losses().values, table.token_losses().values, rtol=1e-5, atol=1e-5
    )
    assert other.metadata["data"] == table.metadata["data"]


def test_token_losses_add_up(table):
    tokens = table.token_losses()
    ids, loss, count = (np.concatenate(column) for column in zip(*table.rows(), strict=True))
    assert len(tokens) == SIZE and table.metadata["num_tokens"] == len(tokens.values)
    for i, mean, size in zip(ids, loss, count, strict=True):
        assert len(tokens[i]) == size
        np.testing.assert_allclose(np.float64(tokens[i]).sum(), mean * size, rtol=1e-5)


def test_token_temperature_and_weights(table):
    losses = np.concatenate(list(table.token_losses()))
    assert table.token_temperature == float(np.float32(np.median(np.float64(losses))))
    weights = table.flow_token_weights()
    assert weights.values.dtype == np.float32
    for tau, found in ((None, weights), (0.7, table.flow_token_weights(0.7))):
        expected = np.exp(-np.float64(losses) / (np.median(losses) if tau is None else tau))
        np.testing.assert_allclose(found.values, expected, rtol=2e-5, atol=1e-38)
    # They are what a packed loader takes.
    (batch,) = training_loader(packed.source(), 32, epochs=1, seed=0, token_weight=weights)
    ids = batch["example_id"][batch["mask"]]
    for i, values in zip(ids, split_tokens(batch, batch["token_weight"]), strict=True):
        np.testing.assert_array_equal(values, weights[i])


def test_a_table_without_token_losses(table, tmp_path):
    plain = packed.score_rows(packed.source(), tmp_path, loss_fn=causal_lm_loss, token_losses=False)
    np.testing.assert_allclose(plain.loss_N(), table.loss_N(), rtol=1e-5)
    assert plain.temperature == float(np.median(plain.loss_N()))
    for use in (
        lambda: plain.token_temperature,
        plain.token_losses,
        plain.flow_token_weights,
    ):
        with pytest.raises(LossTableError, match="no token losses; score again, with token_losses"):
            use()


@pytest.mark.parametrize("kind", SOURCES)
def test_interrupted_scoring_is_completed(kind, tmp_path):
    options = {"batch_size": 4}
    whole = packed.score_rows(SOURCES[kind](), tmp_path / "whole", **options)
    batches = scoring_loader(SOURCES[kind](), 4).steps
    with pytest.raises(InterruptionError):
        packed.score_rows(
            SOURCES[kind](), tmp_path / "parts", progress=stop_after(batches - 2), **options
        )
    saved = loss_parts.seen_ids(tmp_path / "parts", SIZE)
    assert 0 < saved.sum() < SIZE
    with pytest.raises(LossTableError, match="is incomplete"):
        LossTable.open(tmp_path / "parts")
    parts = packed.score_rows(SOURCES[kind](), tmp_path / "parts", **options)
    np.testing.assert_array_equal(parts.loss_N(), whole.loss_N())
    chex.assert_trees_all_equal(list(parts.token_losses()), list(whole.token_losses()))
    assert parts.metadata == whole.metadata
    # Complete: nothing is scored again.
    packed.score_rows(SOURCES[kind](), tmp_path / "parts", progress=stop_after(0), **options)


def test_a_table_of_other_data_is_refused(table):
    examples = packed.examples()
    start = examples.target_start.copy()
    start[3] = 3 - min(start[3], 2)
    other = TokenSource(examples.tokens, examples.offsets, start)
    with pytest.raises(LossTableError, match="data is '"):
        packed.score_rows(packed.source(other), table.directory)
    # Another packing is no other data: the table is opened.
    again = packed.score_rows(packed.padded_source(), table.directory, progress=stop_after(0))
    assert again.fingerprint() == table.fingerprint()


def test_a_bad_token_is_reported_with_its_example_alone(table, tmp_path):
    examples = packed.examples()
    # In company: the second of a row with two or more.
    bad = next(int(row[1]) for row in packed.source().rows(np.arange(SIZE)) if len(row) > 1)
    tokens = examples.tokens.copy()
    tokens[examples.offsets[bad + 1] - 1] = VOCAB + 3
    source = packed.source(TokenSource(tokens, examples.offsets, examples.target_start))
    message = rf"token id {VOCAB + 3} \(in 1 examples, ids \[{bad}\]\), the model a vocabulary of"
    with pytest.raises(DataError, match=message):
        packed.score_rows(source, tmp_path)
    dropped = packed.score_rows(source, tmp_path, on_bad_example="drop")
    assert dropped.metadata["dropped_ids"] == [bad]
    kept = np.arange(SIZE) != bad
    np.testing.assert_array_equal(np.isnan(dropped.loss_N()), ~kept)
    np.testing.assert_allclose(dropped.loss_N()[kept], table.loss_N()[kept], rtol=1e-5)
    assert len(dropped.token_losses()[bad]) == 0
    weights = dropped.flow_token_weights()
    assert packed.ids(packed.load(source, token_weight=weights)) == np.flatnonzero(kept).tolist()


# Training.


def test_resumed_training_is_uninterrupted_bit_for_bit(table, tmp_path):
    # One compilation of the step for all of it: every batch has the same shape.
    chex.clear_trace_counter()

    def loss(model, batch):
        return causal_lm_loss(model, batch)

    loss_fn = chex.assert_max_traces(loss, n=2)  # of the step, and of the check of its contract
    optimizer = OptimizerConfig(name="adamw", learning_rate=0.01, warmup_ratio=0.2)
    stage = StageConfig(
        epochs=2, batch_size=4, micro_batches=2, reduction="weight_mean", optimizer=optimizer
    )
    options = {
        "stage": stage,
        "loss_fn": loss_fn,
        "weight_N": table.flow_weights(),
        "seed": 5,
        "mesh": devices_mesh(2),
        "save_every_steps": 3,
    }
    source, model = packed.source(), packed.model()
    before = packed.flat(nnx.state(model))
    whole = fit(model, source, tmp_path / "whole", **options)
    loader = training_loader(source, 4, epochs=2, seed=5)
    assert (whole.steps, whole.resumed_from) == (loader.steps, 0)
    assert 6 < loader.steps < 2 * SIZE / 4
    for calls in (5, 1):  # both between checkpoints
        with pytest.raises(InterruptionError):
            fit(model, source, tmp_path / "parts", progress=stop_after(calls), **options)
    parts = fit(model, source, tmp_path / "parts", **options)
    assert (parts.steps, parts.resumed_from) == (loader.steps, 3)
    chex.assert_trees_all_equal(
        jax.device_get(parts.model_state), jax.device_get(whole.model_state)
    )
    np.testing.assert_array_equal(packed.flat(nnx.state(model)), before)
    assert np.abs(packed.flat(whole.model_state) - before).max() > 1e-2
