"""Speed, and time lost waiting for data, of loops on a clock of their own."""

import warnings

import numpy as np
import pytest
from flax import nnx

from easy_jax.config import StageConfig
from easy_jax.core.losses import squared_error
from easy_jax.data import ArraySource
from easy_jax.io.metrics_log import MetricsLog, read
from easy_jax.io.throughput import InputBoundWarning, Throughput
from easy_jax.train import fitting, forward
from easy_jax.train.fitting import fit
from easy_jax.train.scoring import score


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Step:
    """A step on the devices: done at a time, which a reader can wait for."""

    def __init__(self, clock, done):
        self.clock, self.done = clock, done

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.done)
        return self


@pytest.fixture
def clock():
    return Clock()


def slowly(clock, batches, seconds):
    """Batches that take their time, on the clock."""
    for batch in batches:
        clock.now += seconds
        yield batch


def run(clock, steps, fetch_seconds, step_seconds, every=5):
    """The loop of `fit` on paper: fetch, dispatch, wait for the step before, read at times."""
    speed = Throughput("loop", clock)
    source = slowly(clock, range(steps), fetch_seconds)
    values = []
    running = Step(clock, 0.0)
    for number in range(1, steps + 1):
        speed.fetch(source)
        before = running
        running = Step(clock, max(clock.now, before.done) + step_seconds)
        before.block_until_ready()
        if number % every == 0:
            values.append(speed.read(running))
    return values


@pytest.mark.parametrize(
    ("fetch_seconds", "step_seconds", "wait"),
    [(0.1, 1.0, 0.0), (1.0, 1.1, 0.0), (2.0, 1.0, 0.5), (4.0, 1.0, 0.75), (1.0, 0.0, 1.0)],
)
def test_only_what_a_step_does_not_hide_is_lost(clock, fetch_seconds, step_seconds, wait):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputBoundWarning)
        values = run(clock, 400, fetch_seconds, step_seconds, every=20)
    for value in values:
        # One fetch in twenty follows a timed step, and is not hidden.
        assert value["input_wait"] == pytest.approx(wait, abs=0.06)
        expected = 1.0 / max(fetch_seconds, step_seconds)
        assert value["steps_per_second"] == pytest.approx(expected, rel=0.06)


def test_a_loop_that_waits_is_told_once(clock):
    told_about = "loop: the devices wait for data 4.% of the time"
    with pytest.warns(InputBoundWarning, match=told_about) as told:
        run(clock, 400, 2.0, 1.0)
    assert len(told) == 1
    assert "worker processes" in str(told[0].message)


def test_no_warning_of_a_busy_or_a_short_loop(clock):
    run(clock, 400, 1.0, 1.0)
    run(clock, 400, 0.02, 0.01)


FETCH_SECONDS = 2.0


class Slow(Throughput):
    """In a loop whose every batch takes two seconds; the devices take none."""

    def __init__(self, name):
        super().__init__(name, Clock())

    def fetch(self, batches):
        return super().fetch(slowly(self._clock, batches, FETCH_SECONDS))


def _loss(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def _model_and_source(size):
    x = np.ones((size, 1), np.float32)
    return nnx.Linear(1, 1, rngs=nnx.Rngs(0)), ArraySource({"x": x, "y": x})


@pytest.mark.slow
def test_fit_measures_and_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "Throughput", Slow)
    model, source = _model_and_source(160)
    log = MetricsLog(tmp_path)
    told = []
    with pytest.warns(InputBoundWarning, match="fit: the devices wait for data 100% of the time"):
        fit(
            model,
            source,
            tmp_path / "checkpoints",
            stage=StageConfig(batch_size=8),
            loss_fn=_loss,
            log=log,
            log_every_steps=5,
            on_speed=told.append,
        )
    log.close()
    speeds = [entry for entry in read(tmp_path) if entry["kind"] == "speed"]
    assert [entry["step"] for entry in speeds] == [5, 10, 15, 20]
    for entry, values in zip(speeds, told, strict=True):
        assert entry == {"stage": "fit", "kind": "speed", "step": entry["step"], **values}
        assert values["examples_per_second"] == pytest.approx(8 / FETCH_SECONDS)
        assert values["steps_per_second"] == pytest.approx(1 / FETCH_SECONDS)
        assert values["input_wait"] == 1.0


def test_scoring_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "Throughput", Slow)
    monkeypatch.setattr(forward, "_SPEED_EVERY", 5)
    model, source = _model_and_source(160)
    with pytest.warns(InputBoundWarning, match="scoring: the devices wait for data"):
        score(model, source, tmp_path, loss_fn=_loss, batch_size=8)
