"""Speed, and time lost waiting for data, of loops whose times are known."""

import io
import time
import warnings

import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from easy_jax import terminal, throughput
from easy_jax.config import StageConfig
from easy_jax.data import Reading
from easy_jax.fitting import fit
from easy_jax.losses import squared_error
from easy_jax.metrics import MetricsLog, read
from easy_jax.scoring import score
from easy_jax.throughput import InputBoundWarning, Throughput


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


class Step:
    """A step on the devices: done at a time, which a reader can wait for."""

    def __init__(self, clock, done):
        self.clock, self.done = clock, done

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.done)
        return self


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def run(clock, steps, fetch_seconds, step_seconds, every=5):
    """The loop of `fit` on paper: fetch, dispatch, wait for the step before, read at times."""

    def batches():
        while True:
            clock.now += fetch_seconds
            yield None

    speed = Throughput("loop")
    source = batches()
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


class SlowSource:
    """Takes its time for every batch."""

    reading = Reading(threads=1, prefetch=1)

    def __len__(self):
        return 160

    def __getitem__(self, position):
        return self.batch([position])

    def batch(self, positions):
        time.sleep(0.02)
        x = np.ones((len(positions), 1), np.float32)
        return {"x": x, "y": x}

    def fingerprint(self):
        return "slow"


def _loss(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def test_fit_measures_and_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_SECONDS", 0.1)
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    log = MetricsLog(tmp_path)
    told = []
    with pytest.warns(InputBoundWarning, match="fit: the devices wait for data"):
        fit(
            model, SlowSource(), tmp_path / "checkpoints", stage=StageConfig(batch_size=8),
            loss_fn=_loss, log=log, log_every_steps=5, on_speed=told.append,
        )  # fmt: skip
    log.close()
    speeds = [entry for entry in read(tmp_path) if entry["kind"] == "speed"]
    assert [entry["step"] for entry in speeds] == [5, 10, 15, 20]
    for entry, values in zip(speeds, told, strict=True):
        assert entry == {"stage": "fit", "kind": "speed", "step": entry["step"], **values}
        assert values["examples_per_second"] == 8 * values["steps_per_second"]
        assert 0 <= entry["input_wait"] <= 1
    assert speeds[-1]["examples_per_second"] <= 8 / 0.018  # 20 ms a batch of 8
    assert speeds[-1]["input_wait"] > 0.3


def test_the_speed_is_printed_once_a_minute(clock, monkeypatch):
    monkeypatch.setattr(terminal, "time", clock)
    file = io.StringIO()
    with terminal.Terminal(Console(file=file, width=200)) as shown:
        shown.start(100)
        shown.describe("finetune")
        for wait in (0.0, 0.3):
            for _ in range(4):
                clock.now += 25.0
                shown.speed({"examples_per_second": 1234.5, "input_wait": wait})
    lines = ["finetune: 1,234 examples/s", "finetune: 1,234 examples/s, 30% waiting for data"]
    assert [line.strip() for line in file.getvalue().splitlines() if line] == lines


def test_scoring_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_SECONDS", 0.1)
    monkeypatch.setattr("easy_jax.scoring._SPEED_EVERY", 5)
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    with pytest.warns(InputBoundWarning, match="scoring: the devices wait for data"):
        score(model, SlowSource(), tmp_path, loss_fn=_loss, batch_size=8)
