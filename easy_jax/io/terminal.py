"""Progress on the terminal: bars with the time left, or lines if the output is a log."""

import contextlib
import functools
import importlib.util
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from easy_jax.io.progress import Calls, Count, Done, Left, Part, clock_time

_FIRST, _EVERY = 10.0, 60.0  # seconds before a log's first line of progress, and between lines
_REDRAW = 0.1  # seconds: redrawing a bar at every step would slow down fast steps
_COMPILED = {"step": "the training step", "score_step": "the forward pass"}  # by JAX's names


def plain_console(**options: Any) -> Console:
    """Returns a console that does not interpret markup or emoji, so paths and names print as is."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def print_whatever_the_encoding() -> None:
    """Makes standard output escape characters it cannot encode (Δ under `LC_ALL=C`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Row(Part):
    """Progress of one stage or of one pass over examples, shown by a `Terminal`."""

    def __init__(self, terminal: "Terminal", name: str, unit: str, where: Path | None):
        self.name, self.unit, self.where = name, unit, where
        self.count = Count(terminal.clock)
        self._terminal = terminal
        self._processes = 1

    def begin(self, total: int, done: int, processes: int = 1) -> None:
        self._processes = processes
        self.count.begin(total, done)
        self._terminal.begun(self)

    def advance(self, count: int) -> None:
        self.count.advance(count * self._processes)
        self._terminal.advanced(self, count)


class Terminal:
    """Display with messages and two progress bars, of the experiment and of the current part.

    If the output is not a terminal (CI, a log file, a pod), it prints lines instead: one for every
    stage, and once a minute the progress and the time left.

    Args:
      console: console to print to; default: standard output.
      quiet: whether to print nothing, as in all processes but the main one.
      brief: whether to omit the lines that announce stages, for calls of a single function.
      clock: function that returns the time in seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        quiet: bool = False,
        brief: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.clock = clock
        self._console = plain_console() if console is None else console
        self._console.quiet = self._console.quiet or quiet
        self._brief = brief
        self._stages: dict[str, int] = {}
        self._counted: set[str] = set()
        self._whole = Count(clock)
        self._row: _Row | None = None
        self._description, self._speed = "starting", ""
        self._say_at: float | None = None
        self._drawn_at = -_REDRAW
        self.is_live = not self._console.quiet and _can_draw(self._console)
        self._progress = Progress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", width=self._room()),
            ),
            BarColumn(10),
            Done(),
            Left(),
            TextColumn("{task.fields[speed]}", markup=False),
            console=self._console,
            transient=not brief,
            disable=not self.is_live,
            # Redirect only output to a terminal, not to a pipe.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._all = self._add("all stages", self._whole, "steps", visible=False)
        self._now = self._add("starting", None)

    def start(self, stages: Mapping[str, int], roughly: bool = False) -> None:
        """Sets the number of steps of every stage, by name, and prints their sum."""
        self._stages = dict(stages)
        total = sum(stages.values())
        self._whole.begin(total, 0)
        self._progress.update(self._all, total=total, visible=total > 0)
        about = "about " if roughly else ""
        count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
        self.print(f"{count}, {about}{total:,} training steps in all")

    def part(self, name: str, unit: str = "steps", where: Path | None = None) -> Part:
        """Returns the argument `progress` of `fit` or `score` for a stage or a pass over examples.

        Args:
          name: name of the stage.
          unit: unit of the counts, `steps` or `examples`.
          where: folder of the stage's checkpoints, with a sub-folder per step.
        """
        self._describe(name)
        return _Row(self, name, unit, where)

    def skip(self, name: str) -> None:
        """Counts a stage as done without running it, because its result exists."""
        if name not in self._counted:
            self._counted.add(name)
            self._whole.skip(self._stages.get(name, 0))
            self._progress.update(self._all, completed=self._whole.done)

    def describe(self, text: str) -> None:
        """Shows a description of current work whose progress is not counted."""
        self._describe(text)
        if not self.is_live:
            self.print(text)

    def _describe(self, text: str) -> None:
        self._row, self._description, self._speed = None, text, ""
        self._progress.remove_task(self._now)
        self._now = self._add(text, None)

    def begun(self, row: _Row) -> None:
        """Shows a stage that begins or continues an earlier run."""
        total, done = row.count.total or 0, row.count.done
        again = row.name in self._counted
        self._row = row
        self._progress.remove_task(self._now)
        self._now = self._add(row.name, row.count, row.unit)
        if row.name in self._stages and not again:
            self._whole.total = (self._whole.total or 0) + total - self._stages[row.name]
            self._whole.skip(done)
            self._progress.update(self._all, total=self._whole.total, completed=self._whole.done)
        self._counted.add(row.name)
        if again:
            return
        where = "" if row.where is None else f", from checkpoint {row.where / str(done)}"
        if done == total and row.unit == "steps":
            self.print(f"{row.name}: done{where or f' before, all {total:,} steps'}")
        elif 0 < done < total:
            self.print(f"{row.name}: continues after {done:,} of {total:,} {row.unit}{where}")
        elif not self.is_live and not self._brief and done < total:
            self.print(f"{row.name}: {total:,} {row.unit}")

    def advanced(self, row: _Row, count: int) -> None:
        """Updates the bars, or prints a line if one is due, after steps of a stage."""
        if row.name in self._stages:
            self._whole.advance(count)
        now = self.clock()
        if self.is_live:
            if now >= self._drawn_at + _REDRAW or row.count.done == row.count.total:
                self._drawn_at = now
                self._progress.update(self._now, completed=row.count.done)
                self._progress.update(self._all, completed=self._whole.done)
            return
        self._say_at = now + _FIRST if self._say_at is None else self._say_at
        if now >= self._say_at and row.count.left() is not None:
            self._say_at = now + _EVERY
            self.print(self._line(row))

    def _line(self, row: _Row) -> str:
        """Returns a line about the progress of a stage and of the experiment."""
        text = f"{row.name}: {row.count.done:,} of {row.count.total:,} {row.unit}{self._speed}"
        if self._whole.total and row.name in self._stages:
            text += f"; {self._whole.done:,} of {self._whole.total:,} steps in all"
            left = self._whole.left()
        else:
            left = row.count.left()
        return f"{text}, about {clock_time(left)} left"

    def speed(self, values: dict[str, float]) -> None:
        """Shows examples per second and, above 5 %, the share of time spent waiting for data."""
        speed = values["examples_per_second"]
        text = f", {speed:,.0f} examples/s" if speed >= 10 else f", {speed:.2g} examples/s"
        if values["input_wait"] > 0.05:
            text += f", {values['input_wait']:.0%} waiting for data"
        self._speed = text
        if self._console.width >= 120:
            self._progress.update(self._now, speed=text.removeprefix(", "))

    def compiling(self, what: str | None) -> None:
        """Shows that a program is being compiled, or that it is done."""
        if what is None:
            self._progress.update(self._now, description=self._short(self._description_now()))
        elif self.is_live:
            self._progress.update(self._now, description=f"compiling {what}")
        elif not self._brief:
            self.print(f"{self._description_now()}: compiling {what} ...")

    def interrupted(self) -> str:
        """Returns the message after Ctrl-C: where the run stopped, and what is saved."""
        row = self._row
        if row is None:
            return f"interrupted ({self._description}); what was done before is kept"
        place = f"interrupted in {row.name} after {row.count.done:,} of {row.count.total:,}"
        if row.where is None:
            return f"{place} {row.unit}; the parts that are written are kept"
        with contextlib.suppress(FileNotFoundError):
            saved = [int(path.name) for path in row.where.iterdir() if path.name.isdigit()]
            if saved:
                return f"{place} {row.unit}; saved up to {max(saved):,} in {row.where}"
        return f"{place} {row.unit}, none saved yet; the stages before it are kept"

    def print(self, what: Any) -> None:
        """Prints a message or a table above the bar."""
        self._console.print(what, soft_wrap=isinstance(what, str))

    def _add(self, name: str, count: Count | None, unit: str = "", visible: bool = True) -> TaskID:
        """Adds a bar, or only its name if there is no count."""
        total, done = (None, 0) if count is None else (count.total, count.done)
        return self._progress.add_task(
            self._short(name),
            total=total,
            completed=done,
            visible=visible,
            count=count,
            unit=unit,
            speed="",
        )

    def _description_now(self) -> str:
        return self._description if self._row is None else self._row.name

    def _room(self) -> int:
        """Returns the number of characters for a name, next to counts and time on the line."""
        return min(40, max(12, self._console.width - 52))

    def _short(self, text: str) -> str:
        """Shortens a name to `_room` characters; its end remains, which is more specific."""
        room = self._room()
        return text if len(text) <= room else f"…{text[1 - room :]}"

    def __enter__(self) -> "Terminal":
        _listen_to_jax()
        _open.append(self)
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        _open.remove(self)


@contextlib.contextmanager
def shown(
    progress: bool | Callable[[int], None] | Part, name: str, unit: str, quiet: bool
) -> Iterator[Part]:
    """Yields the `Part` for the argument `progress` of `fit` and `score`.

    Args:
      progress: True for a bar on standard error in a terminal or notebook, or elsewhere a line if
        an earlier run is continued and one every minute; False for no output; a function to call
        with the number of new steps or examples; or a `Part`, which is yielded unchanged.
      name, unit: labels of the bar.
      quiet: whether to show nothing, for all processes but the main one.
    """
    if isinstance(progress, Part):
        yield progress
    elif progress is True:
        with Terminal(plain_console(stderr=True), quiet=quiet, brief=True) as terminal:
            yield terminal.part(name, unit)
    else:
        yield Calls(progress) if progress else Part()


def _can_draw(console: Console) -> bool:
    """Returns whether bars can be drawn, as in a terminal or in a notebook with widgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


_open: list[Terminal] = []  # the last one shows the program that is being compiled


@functools.cache
def _listen_to_jax() -> None:
    """Registers listeners for the beginning and end of JAX's compilations."""
    import jax

    jax.monitoring.register_scalar_listener(_compilation_begins)
    jax.monitoring.register_event_duration_secs_listener(_compilation_ends)


def _compilation_begins(event: str, value: float, **values: Any) -> None:
    what = _COMPILED.get(str(values.get("fun_name")))
    if event == "/jax/core/compile/jaxpr_trace_duration" and what is not None and _open:
        _open[-1].compiling(what)


def _compilation_ends(event: str, duration_secs: float, **values: Any) -> None:
    names = [f"jit({name})" for name in _COMPILED]
    is_end = event == "/jax/core/compile/backend_compile_duration"
    if is_end and values.get("fun_name") in names and _open:
        _open[-1].compiling(None)
