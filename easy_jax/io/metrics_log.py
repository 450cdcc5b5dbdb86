"""Metrics log with one JSON line per entry, and the same entries in TensorBoard's format."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easy_jax.io import files, sealed
from easy_jax.io.sealed import ArtefactError

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

_KEYS = {"stage": str, "kind": str, "step": int}
_FIX = "delete that line, which the curves of the report then lack"


class MetricsLog:
    """Log that appends to `metrics.jsonl` and `tensorboard/` in a workdir.

    If a run has several processes, only the main one writes (`writes`).
    After a resume, steps since the last checkpoint are logged again; `read` returns only the
    last entry of every (stage, kind, step).
    """

    def __init__(self, workdir: str | os.PathLike[str], *, writes: bool = True):
        self._workdir = files.path(workdir)
        self._file = files.Lines(self._workdir / "metrics.jsonl") if writes else None
        self._board = self._workdir / "tensorboard"
        # TensorBoard's writer supports local folders only, so its files are uploaded later.
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if not files.is_local(workdir):
            self._temporary = tempfile.TemporaryDirectory()
            self._board = Path(self._temporary.name)
        self._writers: dict[str, EventsWriter] = {}

    def write(self, stage: str, kind: str, step: int, values: dict[str, float]) -> None:
        """Logs values of a stage after `step` steps; `kind` is `train` or `validation`."""
        if self._file is None:
            return
        from tensorboardX.event_file_writer import EventsWriter  # imports torch if installed
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        entry = {"stage": stage, "kind": kind, "step": step, **values}
        self._file.append(json.dumps(entry))
        with files.writing(self._board):
            if stage not in self._writers:
                self._close_writers()
                (self._board / stage).mkdir(parents=True, exist_ok=True)
                self._writers = {stage: EventsWriter(str(self._board / stage / "events"))}
            for name, value in values.items():
                summary = scalar(f"{kind}/{name}", value)
                event = Event(summary=summary, step=step, wall_time=time.time())
                self._writers[stage].write_event(event)

    def flush(self) -> None:
        """Writes buffered entries to the files."""
        if self._file is not None:
            self._file.flush()
        with files.writing(self._board):
            for writer in self._writers.values():
                writer.flush()
        if self._temporary is not None:
            files.upload(self._board, self._workdir / "tensorboard")

    def close(self) -> None:
        self._close_writers()
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _close_writers(self) -> None:
        with files.writing(self._board):
            for writer in self._writers.values():
                writer.close()
        self._writers = {}


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Appends an entry to a JSON-lines file."""
    lines = files.Lines(path)
    lines.append(json.dumps(entry))
    lines.close()


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the last entry of every (stage, kind, step) from a workdir's log.

    An incomplete last line, which an interruption can leave, is skipped.

    Raises:
      ArtefactError: a line is not a valid entry; names the file and the line.
    """
    latest: dict[tuple[str, str, int], dict[str, Any]] = {}
    path = files.path(workdir) / "metrics.jsonl"
    for where, entry in sealed.read_lines(path, ArtefactError, _FIX):
        types = {name: type(value) for name, value in entry.items()}
        if _KEYS.items() - types.items() or not {*types.values()} <= {str, int, float}:
            raise ArtefactError(f"{where} is no entry of a log of metrics; {_FIX}")
        latest[entry["stage"], entry["kind"], entry["step"]] = entry
    return list(latest.values())
