"""Files of a workdir, which is a folder or, as `gs://bucket/path`, in an object store.

Local paths are `pathlib`'s, others those of `etils.epath` (which needs `gcsfs` for `gs://`). What
is written appears whole or not at all, also after a power cut: a file is on disk before it is
renamed into place, an object is whole anyway.
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
_PATTERN = set("[]*?\\")  # what glob patterns are made of, where Orbax or an object store looks


class WriteError(OSError):
    """A file cannot be written: a full disk, no permission, a file where a folder belongs."""


@contextmanager
def writing(target: Location) -> Iterator[None]:
    """Whatever the operating system refuses inside is told in one line.

    Args:
      target: what is written; named.

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
            "before is kept; make room (or mend what is named) and run the same command again"
        ) from error


def check_folder(folder: Path) -> None:
    """Refuses a folder whose path would be read as something else when it is looked up again.

    Raises:
      ConfigError: characters of glob patterns, a colon at the end of a name, or bytes that are no
        text, anywhere in the absolute path.

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
    """A path that reads and writes where the location is.

    Raises:
      ConfigError: what talks to the object store is not installed; or a path there that its
        listings would take for a pattern (see `check_folder`).

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
    """Whether it is in a file system, and not in an object store."""
    return "://" not in os.fspath(location)


def write(target: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all; text as UTF-8, whatever the locale.

    Half a character, as the bytes of a file's name can become, is written as its escape.

    Raises:
      WriteError: it cannot be; what was there before is as it was.
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
                temporary.unlink()  # a full disk has better use for the room
            raise


def publish(temporary: Path, target: Path) -> None:
    """Renames a local file or folder into place, when all that it holds is on disk."""
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
        # What some network file systems say of folders, which they need not sync.
        if error.errno != errno.EINVAL or not written.is_dir():
            raise
    finally:
        os.close(handle)


def write_json(target: Path, value: Any) -> None:
    """Writes a JSON file for people and programs, whole or not at all."""
    write(target, json.dumps(value, indent=2) + "\n")


def read_text(source: Path, error: type[Exception], fix: str = "") -> str:
    """The content of a UTF-8 file, whatever the locale.

    Args:
      source: the file.
      error: raised for whatever is wrong with it, with its path.
      fix: what to do then; ends the message.

    Raises:
      FileNotFoundError: there is no such file.
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
    """The JSON object in a file; arguments and errors as for `read_text`.

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
    """A file of lines that grows; what is flushed is kept. A last line cut short is removed.

    An object cannot grow: it is written anew by every flush.

    Raises:
      WriteError: it cannot be opened, or later written.
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
        """Writes out what has been added."""
        with writing(self._target):
            if self._local is not None:
                self._local.flush()
            else:
                self._target.write_text(self._text, encoding="utf-8")

    def close(self) -> None:
        """Writes out, and closes."""
        try:
            self.flush()
        finally:
            if self._local is not None:
                with writing(self._target):
                    self._local.close()


@contextmanager
def local_folder(target: Path) -> Iterator[Path]:
    """A local folder for what can write nowhere else; uploaded at the end.

    Of a local target, the target itself.
    """
    if is_local(target):
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        upload(Path(folder), target)


def upload(folder: Path, target: Path) -> None:
    """Copies all files of a local folder, and of those in it; a `config.json` at the end, so
    that a model's folder which has one is complete."""
    for source in sorted(folder.rglob("*"), key=lambda source: source.name == "config.json"):
        if source.is_file():
            place = target / source.relative_to(folder).as_posix()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read_bytes())
