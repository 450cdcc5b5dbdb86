"""Training stages: resume equals uninterrupted bit for bit, one compilation, SFA, reductions."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import devices_mesh

from easy_jax.config import OptimizerConfig, ResNetConfig, StageConfig
from easy_jax.core import optim
from easy_jax.core.losses import classification_loss, squared_error
from easy_jax.data import ArraySource
from easy_jax.io import metrics_log
from easy_jax.models import resnet
from easy_jax.models.modes import train_mode
from easy_jax.parallel import processes
from easy_jax.train.checkpoint import Checkpointer
from easy_jax.train.fitting import fit

CLASSES = 3


class InterruptionError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def model():
    config = ResNetConfig(width=4, depths=(1, 1))
    return train_mode(resnet.ResNet(config, CLASSES, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    return ArraySource(
        {
            "image": rng.normal(size=(50, 8, 8, 1)).astype(np.float32),
            "label": rng.integers(0, CLASSES, 50).astype(np.int32),
        }
    )


def _stage(**optimizer):
    settings = {"learning_rate": 0.05, "weight_decay": 5e-4, **optimizer}
    return StageConfig(epochs=3, batch_size=16, optimizer=OptimizerConfig(**settings))


def _fit(model, source, directory, **options):
    options = {"stage": _stage(), "mesh": devices_mesh(2), "seed": 5, **options}
    return fit(model, source, directory, loss_fn=classification_loss, **options)


def _weights(size=50):
    return np.random.default_rng(1).random(size).astype(np.float32)


@pytest.mark.slow
def test_resumed_is_uninterrupted_bit_for_bit(model, source, tmp_path):
    options = {
        "weight_N": _weights(),
        "save_every_steps": 4,
        "sfa_beta": 0.5,
        "log_every_steps": 1,
        "stage": _stage(anchor="l2_sp", anchor_strength=0.1),
    }
    logs = [tmp_path / "log_whole", tmp_path / "log_parts"]
    for path in logs:
        path.mkdir()
    log = metrics_log.MetricsLog(logs[0])
    whole = _fit(model, source, tmp_path / "whole", log=log, **options)
    log.close()
    assert (whole.steps, whole.resumed_from) == (10, 0)  # 50 * 3 / 16, padded at the end

    # Interrupted twice, both times between checkpoints.
    for stop_after in (6, 3):
        log = metrics_log.MetricsLog(logs[1])
        done = iter(range(stop_after))

        def stop(_, done=done):
            if next(done, None) is None:
                raise InterruptionError

        with pytest.raises(InterruptionError):
            _fit(model, source, tmp_path / "parts", progress=stop, log=log, **options)
        log.close()
    log = metrics_log.MetricsLog(logs[1])
    parts = _fit(model, source, tmp_path / "parts", log=log, **options)
    log.close()
    assert parts.resumed_from == 4
    chex.assert_trees_all_equal(
        jax.device_get(parts.model_state), jax.device_get(whole.model_state)
    )
    by_step = [
        {entry["step"]: entry for entry in metrics_log.read(path) if entry["kind"] == "train"}
        for path in logs
    ]
    assert by_step[0] == by_step[1]
    assert sorted(by_step[0]) == list(range(1, 11))

    # A finished stage is returned, not repeated.
    again = _fit(model, source, tmp_path / "parts", **options)
    assert again.resumed_from == again.steps == 10
    chex.assert_trees_all_equal(
        jax.device_get(again.model_state), jax.device_get(whole.model_state)
    )


@pytest.mark.slow
def test_one_compilation_for_a_sweep(model, source, tmp_path):
    # Learning rates and weights are data: six stages, one trace of the loss; and an abstract one,
    # which compares the head with the labels.
    chex.clear_trace_counter()
    loss_fn = chex.assert_max_traces(classification_loss, n=2)
    for index, rate in enumerate((0.0, 0.01, 0.1)):
        for weight_N in (None, _weights()):
            fit(
                model,
                source,
                tmp_path / f"{index}{weight_N is None}",
                loss_fn=loss_fn,
                stage=_stage(learning_rate=rate),
                weight_N=weight_N,
                mesh=devices_mesh(2),
            )


@pytest.mark.slow
def test_the_number_of_devices_does_not_matter(model, source, tmp_path):
    one = _fit(model, source, tmp_path / "1", mesh=devices_mesh(1))
    eight = _fit(model, source, tmp_path / "8", mesh=devices_mesh(8))
    chex.assert_trees_all_close(
        jax.device_get(one.model_state), jax.device_get(eight.model_state), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_a_weight_of_nan_is_an_example_left_out(model, source, tmp_path):
    # 32 examples left of 50: two batches per epoch, none of them with a dropped id.
    weight_N = _weights()
    weight_N[32:] = np.nan
    dropped = _fit(model, source, tmp_path / "dropped", weight_N=weight_N)
    first = ArraySource({name: array[:32] for name, array in source.fields.items()})
    without = _fit(model, first, tmp_path / "without", weight_N=weight_N[:32])
    assert dropped.steps == without.steps == 6
    chex.assert_trees_all_equal(
        jax.device_get(dropped.model_state), jax.device_get(without.model_state)
    )


@pytest.mark.slow
def test_sfa_with_beta_one_returns_to_the_start(model, source, tmp_path):
    result = _fit(model, source, tmp_path / "sfa", sfa_beta=1.0)
    start = nnx.to_flat_state(nnx.state(model, nnx.Param))
    end = dict(nnx.to_flat_state(result.model_state))
    for path, value in start:
        np.testing.assert_array_equal(end[path][...], value[...])


@pytest.mark.slow
def test_sfa_averages_with_the_start(model, source, tmp_path):
    # One step and one average at its end: half of the plain step.
    few = ArraySource({name: array[:16] for name, array in source.fields.items()})
    stage = StageConfig(
        epochs=1,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=0.05, schedule="constant"),
    )
    plain = _fit(model, few, tmp_path / "plain", stage=stage)
    half = _fit(model, few, tmp_path / "half", stage=stage, sfa_beta=0.5)
    start = np.asarray(model.head.kernel[...])
    moved = np.asarray(plain.model_state["head"]["kernel"][...]) - start
    averaged = np.asarray(half.model_state["head"]["kernel"][...]) - start
    assert np.abs(moved).max() > 1e-4
    np.testing.assert_allclose(averaged, moved / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_strong_anchor_stays_at_the_start(model, source, tmp_path):
    def distance(result):
        start = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        end = dict(nnx.to_flat_state(result.model_state))
        return sum(
            float(np.abs(np.asarray(end[path][...]) - np.asarray(value[...])).sum())
            for path, value in start.items()
            if path[0] != "head"
        )

    free = distance(_fit(model, source, tmp_path / "free"))
    anchored = distance(
        _fit(
            model,
            source,
            tmp_path / "l2",
            anchored=resnet.is_backbone,
            stage=_stage(anchor="l2_sp", anchor_strength=2.0),
        )
    )
    assert anchored < 0.5 * free


@pytest.mark.slow
def test_epoch_ends_are_told_once_each(model, source, tmp_path):
    seen = []
    _fit(model, source, tmp_path / "a", on_epoch=lambda epoch, state: seen.append(epoch))
    assert seen == [1, 2, 3]


@pytest.mark.slow
def test_the_last_checkpoints_and_the_best_are_kept(model, source, tmp_path, monkeypatch):
    """Of losses that are told, the second is the lowest."""
    told = iter([0.5, 0.1, 0.7, 0.6, 0.4])
    save = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda self, *args: save(self, *args[:4], next(told)))
    _fit(model, source, tmp_path, keep=2, keep_best=True, save_every_steps=2)
    with Checkpointer(tmp_path, {}, keep=2, keep_best=True) as checkpointer:
        best = checkpointer.best_step()
    kept = sorted(int(path.name) for path in tmp_path.iterdir())
    assert (best, kept) == (4, [4, 8, 10])


@pytest.mark.slow
def test_a_save_that_was_cut_off_is_no_checkpoint(model, source, tmp_path):
    whole = _fit(model, source, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    shutil.copytree(
        tmp_path / "whole" / "10", tmp_path / "parts" / "7.orbax-checkpoint-tmp-123"
    )  # as a killed process leaves it
    again = _fit(model, source, tmp_path / "parts")
    assert (whole.steps, again.resumed_from) == (10, 0)


@pytest.mark.slow
def test_a_stop_while_an_epoch_is_evaluated_loses_no_step(model, source, tmp_path):
    whole = _fit(model, source, tmp_path / "whole")

    def evaluate(epoch, _):
        if epoch == 1:
            raise processes.Stopped("while evaluating")

    with pytest.raises(processes.Stopped, match="fit: stopped after step 3 of 10, which is save"):
        _fit(model, source, tmp_path / "parts", on_epoch=evaluate)
    parts = _fit(model, source, tmp_path / "parts", on_epoch=evaluate)
    assert parts.resumed_from == 3
    chex.assert_trees_all_equal(
        jax.device_get(parts.model_state), jax.device_get(whole.model_state)
    )


@pytest.mark.slow
def test_bfloat16_parameters_and_a_small_learning_rate_are_told(tmp_path):
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, dtype=jnp.float32)
    source = ArraySource({"x": np.ones((8, 4), np.float32), "y": np.ones((8, 3), np.float32)})
    stage = StageConfig(batch_size=8, optimizer=OptimizerConfig(name="adamw", learning_rate=1e-6))
    with pytest.warns(optim.LostUpdatesWarning, match=r"\(bfloat16\) .* learning rate, 1e-06"):
        fit(
            linear,
            source,
            tmp_path,
            stage=stage,
            mesh=devices_mesh(1),
            loss_fn=lambda model, batch: squared_error(model(batch["x"]), batch["y"]),
        )
