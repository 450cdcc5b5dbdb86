"""JSON files with a checksum that detects later changes to them.

The checksum covers the values, not the bytes: spaces and the order of keys do not matter.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easy_jax.io import files
from easy_jax.io import fingerprint as fingerprints

KEY = "checksum"


class ArtefactError(ValueError):
    """Error for a file of a workdir that is damaged, changed or computed from different inputs."""


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a value with its checksum as the last key.

    Example:
      >>> seal({"median": 4.9})
      {'median': 4.9, 'checksum': '030fd66ac146b32a'}
    """
    return {**value, KEY: fingerprints.of_json(value)}


def unseal(
    value: Mapping[str, Any], where: object, error: type[Exception], fix: str
) -> dict[str, Any]:
    """Checks the checksum of a value and returns the value without it.

    Args:
      value: parsed JSON object.
      where: file that the value was read from, for the beginning of the message.
      error: type of the exception if the checksum is missing or wrong.
      fix: advice to the user, for the end of the message.

    Example:
      >>> unseal(seal({"median": 4.9}), "metadata.json", ValueError, "score again")
      {'median': 4.9}
      >>> unseal({**seal({"median": 4.9}), "median": 14.9}, "m.json", ValueError, "score again")
      Traceback (most recent call last):
      ValueError: m.json was changed after it was written: its checksum is of other values; \
score again
    """
    content = {key: each for key, each in value.items() if key != KEY}
    try:
        intact = value.get(KEY) == fingerprints.of_json(content)
    except RecursionError as cause:
        raise error(f"{where} is JSON nested too deeply; {fix}") from cause
    if KEY not in value:
        raise error(f"{where} has no checksum: it was changed, or is of an older version; {fix}")
    if not intact:
        raise error(
            f"{where} was changed after it was written: its checksum is of other values; {fix}"
        )
    return content


def write(target: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file with its checksum, atomically.

    Raises:
      WriteError: the file cannot be written.
    """
    files.write_json(target, seal(value))


def read(source: Path, error: type[Exception], fix: str) -> dict[str, Any]:
    """Reads a JSON file with a checksum, checks it, and returns the value without the checksum.

    Args:
      source: path of the file.
      error: type of the exception for any problem but a missing file.
      fix: advice to the user, for the end of the message.

    Raises:
      FileNotFoundError: the file does not exist.

    Example:
      >>> import tempfile
      >>> target = Path(tempfile.mkdtemp()) / "metadata.json"
      >>> write(target, {"median": 4.9})
      >>> read(target, ArtefactError, "score again")
      {'median': 4.9}
    """
    return unseal(files.read_json(source, error, fix), source, error, fix)


def read_lines(source: Path, error: type[Exception], fix: str) -> list[tuple[str, dict[str, Any]]]:
    """Reads the objects of a JSON-lines file, each with its position (file and line number).

    An incomplete last line, which an interruption can leave, is skipped.

    Args:
      source: path of the file; if it does not exist, the result is empty.
      error: type of the exception for any other invalid line; its message has file and line.
      fix: advice to the user, for the end of the message.
    """
    if not source.exists():
        return []
    entries = []
    lines = files.read_text(source, error, fix).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
        except RecursionError as cause:
            raise error(f"{source}:{number} is JSON nested too deeply; {fix}") from cause
        except ValueError as cause:
            if number == len(lines):  # no newline at its end: the write was interrupted
                continue
            raise error(f"{source}:{number} is not JSON: {cause}; {fix}") from cause
        if not isinstance(entry, dict):
            raise error(f"{source}:{number} is not a JSON object but {type(entry).__name__}; {fix}")
        entries.append((f"{source}:{number}", entry))
    return entries
