"""Files of a workdir, which is a local folder or a location in an object store, `gs://bucket/path`.

Local paths are `pathlib.Path`s, others are `etils.epath.Path`s (which need `gcsfs` for `gs://`).
Every write is atomic, also across a power cut: a local file is synced to disk before it is renamed
into place, and object stores replace complete objects only.
"""

import contextlib
import errno
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from easy_jax.io.checks import ConfigError

Location = str | os.PathLike[str]
_PATTERN = set("[]*?\\")  # Orbax and object stores read these as glob patterns


class WriteError(OSError):
    """Error for a file that cannot be written, because of a full disk or permissions, say."""


@contextmanager
def writing(target: Location) -> Iterator[None]:
    """Returns a context manager that turns every `OSError` into a one-line `WriteError`.

    Args:
      target: the file or folder being written, named in the message.

    Raises:
      WriteError: in place of any other `OSError`.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"{os.fspath(target)} cannot be written: {error.strerror or error}. What was complete "
            "before is kept; make room (or fix what is named) and run the same command again"
        ) from error


def check_folder(folder: Path) -> None:
    """Refuses a folder whose path Orbax or an object store would misread, say as a glob pattern.

    Raises:
      ConfigError: the absolute path contains characters of glob patterns, a name that ends with a
        colon, or bytes that are not valid text.

    Example:
      >>> check_folder(Path("/runs/run[1]"))
      Traceback (most recent call last):
      easy_jax.io.checks.ConfigError: the folder /runs/run[1] has '[' in its path, with which \
checkpoints cannot be read back; use another
    """
    text = os.fspath(folder.absolute()) if is_local(folder) else os.fspath(folder)
    odd = next((c for c in text if c in _PATTERN or "\ud800" <= c <= "\udfff"), None)
    if odd is None and ":/" in text.partition("://")[2 if not is_local(folder) else 0]:
        odd = ":/"
    if odd is not None:
        raise ConfigError(
            f"the folder {text} has {odd!r} in its path, with which checkpoints cannot be read "
            "back; use another"
        )


def path(location: Location) -> Path:
    """Returns the path of a location: `pathlib` for local files, `etils.epath` for object stores.

    Raises:
      ConfigError: the package for this object store is not installed, or `check_folder` refuses
        the path.

    Example:
      >>> path("runs/quickstart").name
      'quickstart'
    """
    if is_local(location):
        return Path(location)
    scheme = os.fspath(location).partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        extra = "; pip install 'easy-jax[gcs]'" if scheme == "gs" else ""
        raise ConfigError(f"{location} cannot be opened: {error}{extra}") from error
    remote: Any = epath.Path(location)
    check_folder(remote)
    return remote


def is_local(location: Location) -> bool:
    """Returns whether a location is in a file system rather than in an object store."""
    return "://" not in os.fspath(location)


def write(target: Path, content: str | bytes) -> None:
    """Writes a file atomically; text is encoded as UTF-8, whatever the locale.

    A lone surrogate, which can come from the name of a file, is written as its escape.

    Raises:
      WriteError: the file cannot be written; a previous version of it is unchanged.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with writing(target):
        if not is_local(target):
            target.write_bytes(data)
            return
        temporary = target.with_name(target.name + ".tmp")
        try:
            temporary.write_bytes(data)
            publish(temporary, target)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()  # frees space if the disk is full
            raise


def publish(temporary: Path, target: Path) -> None:
    """Syncs a local file or folder to disk, then renames it into place."""
    inside = temporary.rglob("*") if temporary.is_dir() else ()
    for each in (*inside, temporary):
        _sync(each)
    temporary.replace(target)
    _sync(target.parent)


def _sync(written: Path) -> None:
    handle = os.open(written, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems report EINVAL for folders, which need no sync there.
        if error.errno != errno.EINVAL or not written.is_dir():
            raise
    finally:
        os.close(handle)


def write_json(target: Path, value: Any) -> None:
    """Writes an indented JSON file atomically."""
    write(target, json.dumps(value, indent=2) + "\n")


def read_text(source: Path, error: type[Exception], fix: str = "") -> str:
    """Reads a UTF-8 file, whatever the locale.

    Args:
      source: path of the file.
      error: type of the exception for any problem but a missing file; its message has the path.
      fix: advice to the user, for the end of the message.

    Raises:
      FileNotFoundError: the file does not exist.
    """
    advice = f"; {fix}" if fix else ""
    try:
        return source.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise
    except OSError as cause:
        raise error(f"{source} cannot be read: {cause.strerror or cause}{advice}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{source} is not UTF-8: {cause}{advice}") from cause


def read_json(source: Path, error: type[Exception], fix: str = "") -> dict[str, Any]:
    """Reads the JSON object in a file; arguments and errors are as in `read_text`.

    Example:
      >>> target = Path(tempfile.mkdtemp()) / "metadata.json"
      >>> write_json(target, {"median": 4.9})
      >>> read_json(target, ValueError)
      {'median': 4.9}
    """
    advice = f"; {fix}" if fix else ""
    text = read_text(source, error, fix)
    try:
        content = json.loads(text)
    except RecursionError as cause:
        raise error(f"{source} is JSON nested too deeply{advice}") from cause
    except ValueError as cause:
        raise error(f"{source} is not JSON: {cause}{advice}") from cause
    if not isinstance(content, dict):
        raise error(f"{source} is not a JSON object but {type(content).__name__}{advice}")
    return content


class Lines:
    """Writer that appends lines to a file, after removing an incomplete last line.

    Objects in an object store cannot grow, so every flush writes the complete object again.

    Raises:
      WriteError: the file cannot be opened, or a later write fails.
    """

    def __init__(self, target: Path):
        self._target = target
        self._local: io.TextIOBase | None = None
        with writing(target):
            if is_local(target):
                if target.exists():
                    content = target.read_bytes()
                    whole = content.rfind(b"\n") + 1
                    if whole != len(content):
                        os.truncate(target, whole)
                self._local = target.open("a", encoding="utf-8")
            else:
                content = target.read_bytes() if target.exists() else b""
                self._text = content.decode("utf-8", "backslashreplace")

    def append(self, line: str) -> None:
        """Adds a line; it is on disk after `flush`."""
        if self._local is not None:
            with writing(self._target):
                self._local.write(line + "\n")
        else:
            self._text += line + "\n"

    def flush(self) -> None:
        """Writes the added lines to the file."""
        with writing(self._target):
            if self._local is not None:
                self._local.flush()
            else:
                self._target.write_text(self._text, encoding="utf-8")

    def close(self) -> None:
        """Writes the added lines to the file and closes it."""
        try:
            self.flush()
        finally:
            if self._local is not None:
                with writing(self._target):
                    self._local.close()


@contextmanager
def local_folder(target: Path) -> Iterator[Path]:
    """Yields a local folder for libraries that write only locally, then uploads it to `target`.

    If the target is local, the folder is the target itself.
    """
    if is_local(target):
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        upload(Path(folder), target)


def upload(folder: Path, target: Path) -> None:
    """Copies a local folder with its sub-folders.

    `config.json` is copied last, so that a model's folder that contains one is complete.
    """
    for source in sorted(folder.rglob("*"), key=lambda source: source.name == "config.json"):
        if source.is_file():
            place = target / source.relative_to(folder).as_posix()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read_bytes())
