"""Hooks of the training loop: when they are called, and a loop of one's own."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import easy_jax as ej
from easy_jax.config import OptimizerConfig
from easy_jax.core.losses import squared_error
from easy_jax.io.metrics_log import MetricsLog
from easy_jax.parallel.processes import Stopped
from easy_jax.train.hooks import Hook, Hooks, Loop, Metrics, Speed

STAGE = ej.StageConfig(epochs=2, batch_size=8, optimizer=OptimizerConfig(learning_rate=0.1))


def _loss(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


@pytest.fixture
def source():
    rng = np.random.default_rng(0)
    fields = {name: rng.normal(size=(24, 2)).astype("f") for name in ("x", "y")}
    return ej.ArraySource(fields)


def _model():
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


class _Calls(Hook):
    """Records which methods are called, and where."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def on_start(self, loop):
        self.calls.append(("start", loop.first))

    def on_step(self, loop):
        self.calls.append(("step", loop.step))
        loop.stopped = loop.step == self.stop_at

    def on_epoch(self, loop):
        self.calls.append(("epoch", loop.epoch))

    def on_save(self, loop):
        self.calls.append(("save", loop.step))

    def on_stop(self, loop):
        self.calls.append(("stop", loop.step))


@pytest.mark.slow
def test_the_order_of_calls(source, tmp_path):
    hook = _Calls()
    ej.fit(_model(), source, tmp_path, stage=STAGE, loss_fn=_loss, save_every_steps=4, hooks=[hook])
    assert hook.calls == [
        *[("start", 0), ("step", 1), ("step", 2), ("step", 3), ("epoch", 1)],
        *[("step", 4), ("save", 4), ("step", 5), ("step", 6), ("epoch", 2), ("save", 6)],
        ("stop", 6),
    ]


@pytest.mark.slow
def test_a_hook_stops_the_loop_which_then_continues_to_the_same_result(source, tmp_path):
    def run(name, hook):
        arguments = {"stage": STAGE, "loss_fn": _loss, "hooks": [hook]}
        return ej.fit(_model(), source, tmp_path / name, **arguments)

    whole = run("whole", Hook())
    hook = _Calls(stop_at=2)
    with pytest.raises(Stopped, match="stopped after step 2 of 6, which is saved"):
        run("stopped", hook)
    assert hook.calls[-2:] == [("save", 2), ("stop", 2)]
    again = _Calls()
    continued = run("stopped", again)
    assert again.calls[:2] == [("start", 2), ("step", 3)]
    jax.tree.map(np.testing.assert_array_equal, whole.model_state, continued.model_state)


@pytest.mark.slow
def test_a_loop_of_ones_own_logs_what_fit_logs(source, tmp_path):
    for name in ("fit", "own"):
        (tmp_path / name).mkdir()
    log = MetricsLog(tmp_path / "fit")
    ej.fit(_model(), source, tmp_path / "c", stage=STAGE, loss_fn=_loss, log=log, log_every_steps=2)
    log.close()

    optimizer = ej.make_optimizer(STAGE.optimizer, 6)
    model = _model()
    state = ej.init_train_state(model, optimizer)
    step = ej.make_train_step(nnx.graphdef(model), _loss, optimizer, reduction="example_mean")
    log = MetricsLog(tmp_path / "own")
    hooks = Hooks([Metrics(log, 2), Speed(log, 2, examples_per_step=8)])
    loop = Loop("fit", total=6, epochs=2, state=state)
    hooks.on_start(loop)
    for number, batch in enumerate(ej.training_loader(source, 8, epochs=2, seed=0), start=1):
        loop.step, loop.example_id = number, batch.pop("example_id")
        loop.state, loop.metrics = step(loop.state, ej.shard_batch(batch, ej.make_mesh()))
        hooks.on_step(loop)
    hooks.on_save(loop)
    log.close()

    def entries(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [e for e in map(json.loads, lines) if e["kind"] == "train"]

    assert [e["step"] for e in entries("own")] == [1, 2, 4, 6]
    assert entries("own") == entries("fit")
