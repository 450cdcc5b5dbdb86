"""The metrics log: one JSON line per entry, and the same in TensorBoard's format."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from easy_jax import distributed, files


class MetricsLog:
    """Appends to `metrics.jsonl` and `tensorboard/` in a workdir; one process of several does.

    After a resume, steps since the last checkpoint are logged again; `read` keeps the
    last entry of every (stage, kind, step).
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._workdir = files.path(workdir)
        self._file = files.Lines(self._workdir / "metrics.jsonl") if distributed.leads() else None
        self._board = self._workdir / "tensorboard"
        # TensorBoard's writer knows local folders only; what it writes there is uploaded.
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if not files.is_local(workdir):
            self._temporary = tempfile.TemporaryDirectory()
            self._board = Path(self._temporary.name)
        self._writers: dict[str, SummaryWriter] = {}

    def write(self, stage: str, kind: str, step: int, values: dict[str, float]) -> None:
        """Logs values of a stage after `step` steps; `kind` is `train` or `validation`."""
        if self._file is None:
            return
        entry = {"stage": stage, "kind": kind, "step": step, **values}
        self._file.append(json.dumps(entry))
        if stage not in self._writers:
            self._close_writers()
            self._writers = {stage: SummaryWriter(str(self._board / stage), write_to_disk=True)}
        for name, value in values.items():
            self._writers[stage].add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Writes out what is buffered."""
        if self._file is not None:
            self._file.flush()
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
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Appends to a JSON-lines file; one process of several does."""
    if distributed.leads():
        lines = files.Lines(path)
        lines.append(json.dumps(entry))
        lines.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON-lines file; a last line cut short by a kill is left out.

    Raises:
      ValueError: any other broken line, by file and number.
    """
    if not path.exists():
        return []
    entries = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline at its end: the write was interrupted
                continue
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return entries


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All entries of a workdir's log, the last one of every (stage, kind, step)."""
    latest: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in read_lines(files.path(workdir) / "metrics.jsonl"):
        latest[entry["stage"], entry["kind"], entry["step"]] = entry
    return list(latest.values())
