"""Results of an experiment, stored in `cells.jsonl` with fingerprints of their inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from easy_jax.io import metrics_log, sealed
from easy_jax.io.sealed import ArtefactError
from easy_jax.parallel import processes

Row = dict[str, Any]
_FIX = "delete it, and what it has is measured again, from the checkpoints"


class Measurements:
    """File of result rows, each with a checksum and fingerprints of its inputs.

    Args:
      path: the file with the rows.
      inputs: returns fingerprints, by name, of everything that a row depends on besides the
        configuration, such as pre-trained weights and data files. It is called at most once, in
        all processes, when rows are compared or written.
    """

    def __init__(self, path: Path, inputs: Callable[[], dict[str, str]]):
        self.path = path
        self._find_inputs = inputs
        self._found: dict[str, str] | None = None

    def read(self) -> list[Row]:
        """Returns the stored rows.

        Raises:
          ArtefactError: a line is damaged or was changed, or a row was measured with other inputs
            than the current ones; the message names those that differ.
          DisagreementError: processes differ in their inputs.
        """

        def stored() -> list[Row]:
            lines = sealed.read_lines(self.path, ArtefactError, _FIX)
            return [sealed.unseal(line, where, ArtefactError, _FIX) for where, line in lines]

        rows: list[Row] = processes.broadcast("reading the results", stored)
        for row in rows:
            self._check(row)
        return rows

    def add(self, row: Row) -> Row:
        """Writes a newly measured row; returns it with the fingerprints of its inputs."""
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
