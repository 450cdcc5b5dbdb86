"""Counters of steps or examples, estimates of the time left, and columns for progress bars."""

import datetime
from collections.abc import Callable

from rich.progress import ProgressColumn, Task
from rich.text import Text


class Count:
    """Counter of steps or examples that estimates the time left from the speed so far.

    Steps of an earlier run, and the first step with its compilation, do not count for the speed.

    Example:
      >>> seconds = iter([100.0, 102.0, 104.0])
      >>> count = Count(clock=lambda: next(seconds))
      >>> count.begin(total=20, done=10)
      >>> for _ in range(3):
      ...     count.advance(1)
      >>> count.done, count.left()
      (13, 14.0)
    """

    def __init__(self, clock: Callable[[], float]):
        self.total: int | None = None
        self.done = 0
        self._clock = clock
        self._begun: tuple[float, int] | None = None  # end time and count of the first step
        self._last = 0.0

    def begin(self, total: int | None, done: int) -> None:
        """Sets the total and the number done, and restarts the estimate."""
        self.total, self.done, self._begun = total, done, None

    def advance(self, count: int) -> None:
        """Counts steps or examples that have just been done."""
        self.done += count if self.total is None else min(count, self.total - self.done)
        self._last = self._clock()
        if self._begun is None:
            self._begun = self._last, self.done

    def skip(self, count: int) -> None:
        """Counts steps or examples that an earlier run did."""
        self.done += count
        if self._begun is not None:
            self._begun = self._begun[0], self._begun[1] + count

    def left(self) -> float | None:
        """Returns the estimated seconds left at the last step; None if unknown."""
        if self.total is None or self.done == self.total:
            return None if self.total is None else 0.0
        then, before = (self._last, self.done) if self._begun is None else self._begun
        since = self.done - before
        return (self.total - self.done) * (self._last - then) / since if since else None


class Part:
    """Base class for receivers of the progress of `fit` and `score`; it ignores the progress."""

    def begin(self, total: int, done: int, processes: int = 1) -> None:
        """Receives the counts at the start of the loop; called once.

        Args:
          total: number of all steps or examples.
          done: number of steps or examples that an earlier run has done.
          processes: number of processes, if each one counts only its own examples.
        """

    def advance(self, count: int) -> None:
        """Receives the number of new steps or examples; called after every step or batch."""


class Calls(Part):
    """Receiver of progress that calls a function with every count."""

    def __init__(self, function: Callable[[int], None]):
        self._function = function

    def advance(self, count: int) -> None:
        self._function(count)


class Done(ProgressColumn):
    """Column with the number done and the total."""

    def render(self, task: Task) -> Text:
        count: Count | None = task.fields["count"]
        if count is None:
            return Text("")
        return Text(f"{count.done:,}/{count.total or 0:,} {task.fields['unit']}")


class Left(ProgressColumn):
    """Column with the time left."""

    def render(self, task: Task) -> Text:
        count: Count | None = task.fields["count"]
        return Text("" if count is None else f"{clock_time(count.left())} left")


def clock_time(seconds: float | None) -> str:
    """Formats seconds as hours, minutes and seconds.

    Example:
      >>> clock_time(3725.4), clock_time(None)
      ('1:02:05', '-:--:--')
    """
    return "-:--:--" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
