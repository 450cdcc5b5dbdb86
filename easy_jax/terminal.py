"""What a person sees while an experiment runs: one bar with the time left, and messages."""

import io
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def plain_console(**options: Any) -> Console:
    """A console that prints texts as they are: paths and names are not read as markup or emoji."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def print_whatever_the_encoding() -> None:
    """Escapes what standard output cannot encode (Δ under `LC_ALL=C`) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Terminal:
    """A progress bar over all training steps of an experiment.

    Outside of a terminal (CI, a log file, a pod) only the messages are printed, and once a minute
    the speed; by one process of several: the others are quiet.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self._console = console if console is not None else plain_console(quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left{task.fields[speed]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None, speed="")
        self._said = time.monotonic()  # when the speed was printed

    def start(self, total: int) -> None:
        """Sets the number of steps of the whole experiment."""
        self._progress.update(self._task, total=total)

    def describe(self, text: str) -> None:
        """Says what is going on."""
        self._progress.update(self._task, description=text)

    def advance(self, steps: int) -> None:
        """Counts steps as done."""
        self._progress.update(self._task, advance=steps)

    def speed(self, values: dict[str, float]) -> None:
        """Shows examples per second and, if it is much, the time lost waiting for data."""
        text = f"{values['examples_per_second']:,.0f} examples/s"
        if values["input_wait"] > 0.05:
            text += f", {values['input_wait']:.0%} waiting for data"
        self._progress.update(self._task, speed=f", {text}")
        if not self._console.is_terminal and time.monotonic() - self._said > 60.0:
            self._said = time.monotonic()
            task = self._progress.tasks[0]
            self.print(f"{task.description}: {text}")

    def print(self, what: Any) -> None:
        """Prints a message or a table above the bar."""
        self._console.print(what, soft_wrap=isinstance(what, str))

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
