"""Measurements of a loop over batches: its speed, and the time that devices wait for data."""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

T = TypeVar("T")

_SHARE = 0.2  # warn if more than this share of the time is lost to waiting
_SECONDS = 10.0  # shortest time over which the share is meaningful


class InputBoundWarning(UserWarning):
    """Warning that devices wait for data, with the share of time and advice in the message."""


class Throughput:
    """Meter of a loop's steps per second and the share of time that devices wait for batches.

    A step runs on the devices while the next batch is fetched, so time is lost only if the fetch
    takes longer than the step. The time of a step is measured once in an interval, by waiting for
    one step in `read`; otherwise the loop is not blocked.

    Args:
      name: name of the loop, for the warning.
      clock: function that returns the time in seconds.

    Example:
      >>> throughput = Throughput("fit")
      >>> batches = iter([1, 2])
      >>> [throughput.fetch(batches) for _ in range(2)]
      [1, 2]
      >>> sorted(throughput.read(running=jax.numpy.zeros(())))
      ['input_wait', 'steps_per_second']
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.perf_counter):
        self._name = name
        self._clock = clock
        self._lost, self._elapsed = 0.0, 0.0
        self._compiled = False
        self._warned = False
        self.restart()

    def restart(self) -> None:
        """Starts a new interval, for example after an evaluation, to exclude the time before."""
        self._start = self._clock()
        self._waits: list[float] = []

    def fetch(self, batches: Iterator[T]) -> T:
        """Returns the next batch; call it once per step, after dispatching the previous step."""
        if self._waits and not self._compiled:  # the first step included the compilation
            self._compiled = True
            self.restart()
        start = self._clock()
        batch = next(batches)
        self._waits.append(self._clock() - start)
        return batch

    def read(self, running: Any) -> dict[str, float]:
        """Returns measurements of the interval, and begins the next.

        Args:
          running: outputs of the last dispatched step; the step before it must be finished.

        Returns:
          `steps_per_second`, and `input_wait`, the share of time lost, in [0, 1].

        Warns:
          InputBoundWarning: once, if devices waited for more than a fifth of at least ten seconds.
        """
        start = self._clock()
        jax.block_until_ready(running)
        now = self._clock()
        step, elapsed = now - start, now - self._start
        lost = sum(max(0.0, wait - step) for wait in self._waits)
        self._lost += lost
        self._elapsed += elapsed
        values = {"steps_per_second": len(self._waits) / elapsed, "input_wait": lost / elapsed}
        self.restart()
        if not self._warned and self._elapsed > _SECONDS and self._lost > _SHARE * self._elapsed:
            self._warned = True
            warnings.warn(
                f"{self._name}: the devices wait for data {self._lost / self._elapsed:.0%} of the "
                "time. Read with more threads or worker processes (`Reading`; of images: "
                "data.threads, data.workers), or make the files smaller: images much larger than "
                "resize_size cost time to decode",
                InputBoundWarning,
                stacklevel=2,
            )
        return values
