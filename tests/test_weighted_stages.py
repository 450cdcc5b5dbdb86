"""Weightings in stages of training: resumption, identities, bad weights, and loss tables."""

import functools

import chex
import jax.numpy as jnp
import numpy as np
import packed
import pytest
from flax import nnx
from test_model_weights import STAGE, _source, _squares

import easy_jax as ej
from easy_jax.core import weightings
from easy_jax.core.causal_lm import causal_lm_loss
from easy_jax.data import ArraySource, DataError, Ragged
from easy_jax.io.checks import ConfigError
from easy_jax.parallel.processes import Stopped
from easy_jax.train.checkpoint import CheckpointError
from easy_jax.train.fitting import fit
from easy_jax.train.hooks import TrainingError
from easy_jax.train.loss_table import LossTableError
from easy_jax.train.weights import identity_of

pytestmark = pytest.mark.slow


def _resumed(folder, model, source, make, table=None):
    """A stage that stopped after an epoch, checked against the uninterrupted one.

    `make(**options)` gives the weighting; returns the resumed stage, and a function that tries to
    continue it with a weighting of other options.
    """

    def run(name, stop=None, **options):
        def on_epoch(epoch, state):
            if stop == epoch:
                raise Stopped("for the test")

        return fit(
            model,
            source,
            folder / name,
            stage=STAGE,
            loss_fn=_squares,
            weighting=make(**options),
            table=table,
            on_epoch=on_epoch,
            progress=False,
        )

    expected = run("whole")
    with pytest.raises(Stopped):
        run("stopped", stop=1)
    found = run("stopped")
    chex.assert_trees_all_equal(found.model_state, expected.model_state)
    return found, functools.partial(run, "stopped")


def test_the_old_model_is_resumed_bit_for_bit(tmp_path):
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def make(steps=3):
        return weightings.get("psft", refresh_steps=steps)

    found, again = _resumed(tmp_path, model, _source(), make)
    assert found.resumed_from == 4  # between two refreshes
    with pytest.raises(CheckpointError, match="the weighting"):
        again(steps=2)


def test_a_stage_with_a_weighting_resumes_to_the_same_result(tmp_path):
    @weightings.register
    def mine_ratio(stats, *, limit=2.0):
        return jnp.minimum(jnp.exp(stats.frozen_nll - stats.nll), limit)

    source, model = _source(), nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    table = ej.score(model, source, tmp_path / "table", loss_fn=_squares, batch_size=8)
    make = functools.partial(weightings.get, "mine_ratio")
    found, again = _resumed(tmp_path, model, source, make, table)
    assert 0 < found.resumed_from < found.steps
    with pytest.raises(CheckpointError, match="the weighting"):
        again(limit=3.0)


def test_the_identity_of_a_weighting_is_that_of_its_code():
    def made(scale):
        def mine_scaled(stats, *, limit=2.0):
            return jnp.minimum(stats.nll * scale, limit)

        weightings.register(mine_scaled)
        return weightings.get("mine_scaled", limit=1.0)

    first, again, other = (identity_of(made(scale)) for scale in (2.0, 2.0, 3.0))
    assert first == again != other
    assert "0x" not in first and "limit" in first
    nested = [identity_of(weightings.get("mean_one", of="power", exponent=e)) for e in (1.0, 2.0)]
    assert nested[0] != nested[1] and "Power" in nested[0]
    assert str(made(2.0)) == "mine_scaled(limit=1.0, floor=0.0)"


def test_bad_weights_stop_training_with_the_step_and_its_examples(tmp_path):
    for bad in (-1.0, np.nan):

        def mine_bad(stats, *, value=bad):
            return jnp.where(stats.nll > -1.0, value, 1.0)

        weightings.register(mine_bad)
        model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        with pytest.raises(TrainingError, match=r"8 weights that are negative.* step 1.*ids"):
            fit(
                model,
                _source(),
                tmp_path / str(bad),
                stage=STAGE,
                loss_fn=_squares,
                weighting=weightings.get("mine_bad"),
                progress=False,
            )


def test_what_does_not_belong_to_the_training_data_is_refused(tmp_path):
    source, model = _source(), nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def run(**options):
        return fit(model, source, tmp_path / "fit", stage=STAGE, loss_fn=_squares, **options)

    table = ej.score(model, source, tmp_path / "table", loss_fn=_squares, batch_size=8)
    fields = dict(source.fields, y=-source.fields["y"])
    other = ej.score(model, ArraySource(fields), tmp_path / "other", loss_fn=_squares, batch_size=8)
    fewer = ej.score(model, _source(8), tmp_path / "fewer", loss_fn=_squares, batch_size=8)
    with pytest.raises(LossTableError, match="other was computed with different inputs: data is"):
        run(weighting=weightings.Flow(), table=other)
    with pytest.raises(ConfigError, match="is of 8 examples, and the training data have 32"):
        run(weighting=weightings.Dft(), table=fewer)
    with pytest.raises(ConfigError, match=r"FlowOnline.*give online="):
        run(weighting=weightings.FlowOnline(), table=table)
    with pytest.raises(DataError, match=r"weight_N has shape \(3,\), and the loss table \(32,\)"):
        run(weighting=weightings.Flow(), table=table, weight_N=np.ones(3))


def test_token_weights_of_other_lengths_than_the_table_s_are_refused(tmp_path):
    table = packed.score_rows(packed.source(), tmp_path)
    offsets = np.cumsum([0, *packed.examples().num_targets])
    moved = np.array([0, *(offsets[1:-1] + 1), offsets[-1]])
    with pytest.raises(DataError, match="token weights of different lengths for the same examples"):
        fit(
            packed.model(),
            packed.source(),
            tmp_path / "fit",
            stage=STAGE,
            loss_fn=causal_lm_loss,
            token_weight=Ragged(np.ones(offsets[-1], np.float32), moved),
            weighting=weightings.FlowToken(),
            table=table,
        )


def test_a_weighting_of_frozen_losses_needs_a_table(tmp_path):
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    for name in ("flow", "iw"):
        with pytest.raises(ConfigError, match=r"reads the frozen model's losses: give table="):
            fit(
                model,
                _source(),
                tmp_path,
                stage=STAGE,
                loss_fn=_squares,
                weighting=weightings.get(name),
            )
