"""What an experiment has measured, kept in `cells.jsonl` with all that it depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from easy_jax.io import metrics_log, sealed
from easy_jax.io.sealed import ArtefactError
from easy_jax.parallel import processes

Row = dict[str, Any]
_FIX = "delete it, and what it has is measured again, from the checkpoints"


class Measurements:
    """Rows of results, each measured once, sealed, and with fingerprints of its inputs.

    Args:
      path: of the file with the rows.
      inputs: called once, when there is something to compare or to write: fingerprints, by
        name, of all that a row depends on and the configuration does not fix, such as given
        weights and files of data. All processes call it.
    """

    def __init__(self, path: Path, inputs: Callable[[], dict[str, str]]):
        self.path = path
        self._find_inputs = inputs
        self._found: dict[str, str] | None = None

    def read(self) -> list[Row]:
        """The rows that are there.

        Raises:
          ArtefactError: a line that is damaged or was changed, or rows from other inputs than
            there are now; those are named.
          DisagreementError: several processes, and not the same inputs in all.
        """

        def stored() -> list[Row]:
            lines = sealed.read_lines(self.path, ArtefactError, _FIX)
            return [sealed.unseal(line, where, ArtefactError, _FIX) for where, line in lines]

        rows: list[Row] = processes.broadcast("reading the results", stored)
        for row in rows:
            self._check(row)
        return rows

    def add(self, row: Row) -> Row:
        """Writes a row of what has just been measured; returns it with its inputs."""
        row = {**row, "inputs": self._inputs()}
        if processes.is_main_process():
            metrics_log.append_line(self.path, sealed.seal(row))
        return row

    def _check(self, row: Row) -> None:
        ours, theirs = self._inputs(), row["inputs"]
        wrong = [
            f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]
        if wrong:
            raise ArtefactError(
                f"{self.path} has results, of {row['method']}, from other inputs than there are "
                f"now: {'; '.join(wrong)}. Use another --workdir, or {_FIX}"
            )

    def _inputs(self) -> dict[str, str]:
        if self._found is None:
            found = self._find_inputs()
            processes.assert_equal_across_processes("the inputs of the results", **found)
            self._found = found
        return self._found
