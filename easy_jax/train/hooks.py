"""Hooks of the training loop, such as logging, progress and evaluation.

`fit` and custom training loops call the same five methods. The hooks of a loop share a `Loop`,
which holds its current step and state; they read metrics one step late, so that the devices
stay busy.
"""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easy_jax import data
from easy_jax.core import merge
from easy_jax.core.train_state import TrainState
from easy_jax.io.metrics_log import MetricsLog
from easy_jax.io.progress import Part
from easy_jax.io.throughput import Throughput
from easy_jax.parallel import processes


class TrainingError(RuntimeError):
    """Error raised if training cannot continue; the message names stage, step and examples."""


@dataclasses.dataclass
class Loop:
    """State of a training loop, which its hooks read and may change.

    Attributes:
      name: the stage's name in logs and errors.
      total, epochs: steps and epochs of the stage.
      state: the train state after the last step; a hook may replace it.
      first: number of steps done before this run.
      step: number of the last step, from 1.
      epoch: number of epochs done.
      metrics: metrics of the last step, arrays on the devices.
      example_id: example ids of the last batch, on the host; negative for padding.
      weightless: whether all weights that the host gave the last batch are 0.
      stopped: set to True by a hook to save and stop after this step.
      seconds: time spent in the loop up to the last pause.
      saved_seconds: time spent in the loop up to the last checkpoint.
      throughput: measures the loop's speed.
    """

    name: str
    total: int
    epochs: int
    state: TrainState
    first: int = 0
    step: int = 0
    epoch: int = 0
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    example_id: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    weightless: bool = False
    stopped: bool = False
    seconds: float = 0.0
    saved_seconds: float = 0.0
    throughput: Throughput = dataclasses.field(default_factory=lambda: Throughput("training"))
    _clock: float = dataclasses.field(default_factory=time.perf_counter)

    def ends_epoch(self) -> bool:
        """Returns whether the last step ended an epoch; updates `epoch` if so."""
        ends = _epoch_ends(self.total, self.epochs)
        self.epoch = ends.get(self.step, self.epoch)
        return self.step in ends

    def restart_clock(self) -> None:
        """Starts counting seconds from now."""
        self._clock = time.perf_counter()

    def elapsed(self) -> float:
        """Returns the seconds spent in the loop, over all runs, excluding time in `paused`."""
        return self.seconds + time.perf_counter() - self._clock

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context that stops the clock and allows transfers between host and devices."""
        self.seconds = self.elapsed()
        with jax.transfer_guard("allow"):
            yield
        self.restart_clock()
        self.throughput.restart()


@functools.lru_cache(maxsize=8)
def _epoch_ends(total: int, epochs: int) -> dict[int, int]:
    """Returns `{last step of an epoch: number of epochs done after it}`."""
    return {round(total / epochs * epoch): epoch for epoch in range(1, epochs + 1)}


class Hook:
    """Base class of hooks; every method does nothing unless overridden.

    Hooks are called in every process. Read `loop.metrics` one step late: reading those of the
    last step waits for the devices.

    Example:
      >>> class Count(Hook):
      ...     steps = 0
      ...     def on_step(self, loop):
      ...         self.steps += 1
      >>> count = Count()
      >>> loop, hooks = Loop("mine", total=3, epochs=1, state=None), Hooks([count])
      >>> hooks.on_start(loop)
      >>> for step in range(1, loop.total + 1):
      ...     loop.step = step  # loop.state, loop.metrics = train_step(loop.state, batch)
      ...     hooks.on_step(loop)
      >>> hooks.on_stop(loop)
      >>> count.steps
      3
    """

    def on_start(self, loop: Loop) -> None:
        """Called before the first step of this run, after `loop.first` earlier steps."""

    def on_step(self, loop: Loop) -> None:
        """Called after every step has been dispatched."""

    def on_epoch(self, loop: Loop) -> None:
        """Called after the last step of an epoch; `loop.epoch` epochs are done."""

    def on_save(self, loop: Loop) -> None:
        """Called before a checkpoint is written, including the last one before the loop stops."""

    def on_stop(self, loop: Loop) -> None:
        """Called after the last step, or after a stopped loop has saved its checkpoint."""


class Hooks(Hook):
    """Hook that calls several hooks in order."""

    def __init__(self, hooks: Iterable[Hook]):
        self._hooks = tuple(hooks)

    def on_start(self, loop: Loop) -> None:
        for hook in self._hooks:
            hook.on_start(loop)

    def on_step(self, loop: Loop) -> None:
        for hook in self._hooks:
            hook.on_step(loop)

    def on_epoch(self, loop: Loop) -> None:
        for hook in self._hooks:
            hook.on_epoch(loop)

    def on_save(self, loop: Loop) -> None:
        for hook in self._hooks:
            hook.on_save(loop)

    def on_stop(self, loop: Loop) -> None:
        for hook in self._hooks:
            hook.on_stop(loop)


class Averaging(Hook):
    """Hook for SFA (arXiv:2502.02797): after every quarter of the steps the parameters become
    `(1 - beta) * current + beta * starting`."""

    def __init__(self, start: nnx.State, beta: float):
        self._start = jax.tree.map(jnp.copy, start)
        self._beta = beta

    def on_step(self, loop: Loop) -> None:
        if loop.step in merge.sfa_steps(loop.total):
            params = _average(loop.state.params, self._start, self._beta)
            loop.state = dataclasses.replace(loop.state, params=params)


@functools.partial(jax.jit, static_argnames="beta", donate_argnums=0)
def _average(params: Any, start: Any, beta: float) -> Any:
    return merge.interpolate(params, start, beta)


class Metrics(Hook):
    """Hook that checks and logs each step's metrics, one step late or before a checkpoint.

    Raises:
      TrainingError: a loss or gradient norm is not finite; the message gives the example ids.
    """

    def __init__(self, log: MetricsLog | None, every: int):
        self._log, self._every = log, every
        self._pending: tuple[Loop, dict[str, jax.Array]] | None = None
        self._losses: list[float] = []  # since the last checkpoint
        self._told = False  # whether a batch whose weights are all 0 has been reported

    def on_step(self, loop: Loop) -> None:
        self._record()
        self._pending = dataclasses.replace(loop), loop.metrics

    def on_save(self, loop: Loop) -> None:
        self._record()
        if self._log is not None:
            self._log.flush()  # steps before a checkpoint are not logged again

    def mean_loss(self) -> float:
        """Returns the mean loss of the steps since the last call."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses)

    def _record(self) -> None:
        if self._pending is None:
            return
        (loop, metrics), self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        _check_weights(loop, values.pop("weight_bad", 0.0))
        _check_metrics(loop, values["loss"], values["grad_norm"])
        if self._log is not None and (loop.step % self._every == 0 or loop.step == 1):
            self._log.write(loop.name, "train", loop.step, values)
        self._losses.append(values["loss"])
        if loop.weightless and values["loss"] == values["grad_norm"] == 0 and not self._told:
            self._told = True
            warnings.warn(
                f"{loop.name}: nothing is learnt in step {loop.step}: all weights of its batch are "
                f"0, {_examples(loop)}. Later steps of the kind are not told",
                data.DataWarning,
                stacklevel=3,
            )


def _examples(loop: Loop) -> str:
    ids = loop.example_id[loop.example_id >= 0]
    return f"example ids {ids[:10].tolist()}{' ...' if ids.size > 10 else ''}"


def _check_weights(loop: Loop, bad: float) -> None:
    if bad:
        raise TrainingError(
            f"{loop.name}: the weighting gave {bad:.0f} weights that are negative or not finite at "
            f"step {loop.step}, on {_examples(loop)}; weights must be finite and at least 0"
        )


def _check_metrics(loop: Loop, loss: float, norm: float) -> None:
    if not np.isfinite(loss):
        raise TrainingError(
            f"{loop.name}: the loss is {loss} at step {loop.step}, on {_examples(loop)}. Either one"
            " of them is bad (a label out of range?), or training diverged: lower the learning rate"
        )
    if not np.isfinite(norm):
        raise TrainingError(
            f"{loop.name}: the loss is {loss:.4g} at step {loop.step}, but the norm of its gradient"
            f" is {norm}, on {_examples(loop)}. Either the loss of one of them has no derivative "
            "there (a root or a logarithm of 0?), or training diverged: lower the learning rate"
        )


class Speed(Hook):
    """Hook that logs examples and steps per second, and the share of time waiting for data."""

    def __init__(
        self,
        log: MetricsLog | None,
        every: int,
        examples_per_step: float,
        on_speed: Callable[[dict[str, float]], None] | None = None,
    ):
        self._log, self._every, self._on_speed = log, every, on_speed
        self._examples_per_step = examples_per_step

    def on_step(self, loop: Loop) -> None:
        if loop.step % self._every:
            return
        speed = loop.throughput.read(loop.metrics)
        speed["examples_per_second"] = self._examples_per_step * speed["steps_per_second"]
        if self._log is not None:
            self._log.write(loop.name, "speed", loop.step, speed)
        if self._on_speed is not None:
            self._on_speed(speed)


class Bar(Hook):
    """Hook that advances a progress bar."""

    def __init__(self, part: Part):
        self._part = part

    def on_start(self, loop: Loop) -> None:
        self._part.begin(loop.total, loop.first)

    def on_step(self, loop: Loop) -> None:
        self._part.advance(1)


class Evaluation(Hook):
    """Hook that calls a function after each epoch, with the number of epochs and the variables.

    Its time is not counted; if the function raises `Stopped`, the loop saves and stops.
    """

    def __init__(self, function: Callable[[int, nnx.State], None]):
        self._function = function

    def on_epoch(self, loop: Loop) -> None:
        with loop.paused():
            try:
                self._function(loop.epoch, loop.state.model_state())
            except processes.Stopped:
                loop.stopped = True


def standard_hooks(
    state: TrainState,
    sfa_beta: float | None,
    metrics: Metrics,
    speed: Speed,
    bar: Bar,
    on_epoch: Callable[[int, nnx.State], None] | None,
) -> list[Hook]:
    """Returns the hooks of `fit` itself, in the order in which they are called."""
    averaging = [] if sfa_beta is None else [Averaging(state.params, sfa_beta)]
    evaluation = [] if on_epoch is None else [Evaluation(on_epoch)]
    return [*averaging, metrics, speed, bar, *evaluation]
