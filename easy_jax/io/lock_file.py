"""Lock file of a folder: atomic creation, reading, renewal and replacement.

There is one class for file systems and one for object stores. `easy_jax.parallel.lock` decides
when to call them.
"""

import contextlib
import dataclasses
import errno
import json
import os
import time
from pathlib import Path

import fsspec

from easy_jax.io import files

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV)
_SETTLES = 0.2  # seconds after which all readers see the last of several concurrent writes


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
      host: name of its machine.
      kernel: boot id and process-id namespace, within which process ids can be compared; empty if
        unknown.
      pid: its process id.
      started: its start time, in the kernel's ticks since boot; empty if unknown.
      since: the time at which it took the lock, as text in UTC.
      token: a random text that identifies this lock.
    """

    host: str
    kernel: str
    pid: int
    started: str
    since: str
    token: str

    @property
    def process(self) -> tuple[str, str, int, str]:
        """A key that identifies the process."""
        return self.host, self.kernel, self.pid, self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclasses.dataclass(frozen=True)
class Found:
    """The content of a lock file when it was read. It changes when the lock is renewed."""

    content: bytes
    changed: int  # nanoseconds, of the file system's clock; 0 in an object store

    @property
    def owner(self) -> Owner | None:
        """The owner that the file names; None if the file is damaged."""
        try:
            entry = json.loads(self.content)
            owner = Owner(**entry)
        except (ValueError, TypeError, RecursionError):
            return None
        types = {field.name: field.type for field in dataclasses.fields(Owner)}
        right = all(type(entry[name]) is kind for name, kind in types.items())
        return owner if right and owner.pid > 0 else None


class _File:
    """A lock file in a file system."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> Found | None:
        try:
            with self._path.open("rb") as file:
                return Found(file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    def create(self, owner: Owner) -> bool:
        """Creates the file atomically; returns whether it did, False if the file existed."""
        new = self._write(owner)
        try:
            os.link(new, self._path)
            return True
        except FileExistsError:
            # NFS may lose the reply and repeat the request; then the first one created the link.
            return new.stat().st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with contextlib.suppress(FileExistsError), self._path.open("xb") as file:
                file.write(_content(owner))
                return True
            return False
        finally:
            new.unlink(missing_ok=True)

    def replace(self, owner: Owner | None) -> None:
        if owner is None:
            self._path.unlink(missing_ok=True)
        else:
            self._write(owner).replace(self._path)

    def renew(self, owner: Owner, count: int) -> None:
        del count
        with self._path.open("rb") as file:
            if Found(file.read(), 0).owner == owner:
                # By descriptor, because the path may by now be the file of another owner.
                os.utime(file.fileno())

    def _write(self, owner: Owner) -> Path:
        new = self._path.with_name(f"{self._path.name}.{owner.token}")
        new.write_bytes(_content(owner))
        return new


class _Object:
    """A lock in an object store; renewing it writes the object again."""

    def __init__(self, path: Path):
        self._fs, self._path = fsspec.url_to_fs(os.fspath(path))

    def read(self) -> Found | None:
        try:
            return Found(self._fs.cat_file(self._path), 0)
        except FileNotFoundError:
            return None

    def create(self, owner: Owner) -> bool:
        """Creates the object; returns whether this process's write won."""
        try:
            self._fs.pipe_file(self._path, _content(owner), mode="create")
        except (FileExistsError, NotImplementedError, TypeError) as error:
            if isinstance(error, FileExistsError) or self.read() is not None:
                return False
            self._fs.pipe_file(self._path, _content(owner))  # this store has no conditional writes
        time.sleep(_SETTLES)
        found = self.read()
        return found is not None and found.owner == owner

    def replace(self, owner: Owner | None) -> None:
        if owner is None:
            self._fs.rm_file(self._path)
        else:
            self._fs.pipe_file(self._path, _content(owner))

    def renew(self, owner: Owner, count: int) -> None:
        found = self.read()
        if found is not None and found.owner == owner:
            self._fs.pipe_file(self._path, _content(owner) + b" " * (count % 8))


def _content(owner: Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode()


def at(path: Path) -> "_File | _Object":
    """Returns the lock file at a path; the file need not exist."""
    return _File(path) if files.is_local(path) else _Object(path)
