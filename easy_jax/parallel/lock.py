"""A lock file that lets only one run at a time write to a directory.

The file `run.lock` in the directory identifies the process that holds it: host, process id, start
time of the process, time of locking, and a random token. A thread of the owner renews the file
every 15 seconds. A process that finds a lock decides as follows whether its owner still runs:

- If the owner is on the same machine, the kernel knows. If there is no process with that id, or if
  it started at another time (the id was reused), the lock is taken over at once.
- If the owner is on another machine, or in a container with its own process ids, the lock is
  watched. If it is not renewed for two minutes, it is taken over. Only the watcher's clock measures
  this time; clocks of different machines are never compared.

If several processes lock a directory at the same moment, exactly one succeeds. In a file system the
lock is written under a temporary name and then hard-linked to its final name, which is atomic also
on NFS; without hard links it is created exclusively (`O_EXCL`). In an object store it is written
on the condition that the object does not exist, and read back. A process that takes over a lock
holds a second lock (`run.lock.taking`) while it does.

Existing solutions were not sufficient. `filelock`'s soft locks neither expire nor detect reused
process ids. Kernel locks (`flock`) are invisible to other machines on some file systems, and object
stores do not have them.
"""

import contextlib
import datetime
import errno
import functools
import inspect
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from easy_jax.io import files, lock_file
from easy_jax.io.lock_file import Found, Owner
from easy_jax.parallel import processes

P = ParamSpec("P")
R = TypeVar("R")

NAME = "run.lock"
RENEWED_EVERY = 15.0  # seconds
LEASE = 120.0  # seconds; NFS clients may see a change one minute late

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_WATCHED_EVERY = 0.5  # seconds

_locks: list["Lock"] = []  # the directory locks that this process holds
_held: set[str] = set()  # tokens of the locks that this process holds
_dead: set[tuple[str, str, int, str]] = set()  # processes that were found to have ended


class LockError(RuntimeError):
    """Another run is using a directory, or has taken over its lock; the message names that run."""


class LockWarning(UserWarning):
    """A lock is being watched, or is taken over from a run that has ended."""


@contextlib.contextmanager
def hold(directory: str | os.PathLike[str], *, take_over: bool = False) -> Iterator[None]:
    """Context manager that holds the lock of a directory; all processes of a run must enter it.

    Process 0 takes the lock for the whole run, and creates the directory if it does not exist. If
    it has no permission to write there, nothing is locked: a run that only reads needs no lock, and
    any other fails at its first write.

    Args:
      directory: the directory to lock.
      take_over: take the lock even if another run holds it.

    Raises:
      LockError: another run holds the lock, or the directory cannot be written to. Raised in every
        process.

    Warns:
      LockWarning: the owner is on another machine, and the lock is watched or taken over.

    Example:
      >>> import tempfile
      >>> directory = tempfile.mkdtemp()
      >>> with hold(directory):
      ...     print(os.listdir(directory))
      ['run.lock']
      >>> os.listdir(directory)
      []
    """
    lock = Lock(files.path(directory) / NAME)

    def attempt() -> list[Any]:
        try:
            return [lock.attempt(take_over), ""]
        except LockError as error:
            return [False, str(error)]
        except OSError as error:
            if error.errno in _READ_ONLY or not lock.directory.is_dir():
                return [True, ""]
            return [False, f"cannot write to {directory}: {error}"]

    held = False
    try:
        # Short attempts: if process 0 waited inside `broadcast`, the collective could time out in
        # the other processes, as if process 0 were lost.
        while not held:
            held, refused = processes.broadcast("taking the lock", attempt)
            if refused:
                raise LockError(refused)
        lock.keep()
        _locks.append(lock)
        yield
    finally:
        lock.release()
        if lock in _locks:
            _locks.remove(lock)


def alone(
    check: Callable[[Path], None] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator that holds the lock of the function's argument `directory` during a call.

    Args:
      check: called with the directory before it is locked or created; raises to refuse it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def holding(*args: P.args, **kwargs: P.kwargs) -> R:
            directory = files.path(signature.bind(*args, **kwargs).arguments["directory"])
            if check is not None:
                check(directory)
            with hold(directory):
                return function(*args, **kwargs)

        return holding

    return decorate


def check(directory: str | os.PathLike[str]) -> None:
    """Raises LockError if another run has taken over a lock of this process; call before writing.

    Args:
      directory: nothing is checked if this process does not hold its lock.
    """
    for lock in list(_locks):
        if lock.directory == _absolute(files.path(directory)):
            lock.check()


class Lock:
    """A lock file, which the caller tries to take with `attempt` until it succeeds.

    Use `hold` to lock a directory.
    """

    def __init__(self, path: Path):
        self._path = path
        self._store = lock_file.at(path)
        self._owner: Owner | None = None  # while this process holds it
        self._watched: tuple[Found, float] | None = None  # first content seen, and its time
        self._guard: Lock | None = None
        self._done = threading.Event()

    @property
    def directory(self) -> Path:
        """The directory that contains the lock file."""
        return _absolute(self._path.parent)

    def attempt(self, take_over: bool = False) -> bool:
        """Takes the lock if it is free or abandoned; returns within about a second.

        Returns:
          Whether this process now holds the lock. If not, the caller should try again: the owner's
          state is not known yet, or another process was faster.

        Raises:
          LockError: the owner is running.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        found, mine = self._store.read(), _this_process()
        if found is not None and not take_over and not self._is_abandoned(found):
            time.sleep(_WATCHED_EVERY)
            return False
        _held.add(mine.token)
        taken = self._store.create(mine) if found is None else self._replace(found, mine)
        if not taken:
            _held.discard(mine.token)
            return False
        if found is not None and found.owner is not None:
            _dead.add(found.owner.process)
        self._owner = mine
        return True

    def keep(self) -> None:
        """Starts a thread that renews the lock until it is released."""
        if self._owner is not None:
            threading.Thread(target=self._renew, args=[self._owner], daemon=True).start()

    def check(self) -> None:
        """Raises LockError if another run has taken it over."""
        if self._owner is None:
            return  # process 0 of this run holds it
        found = self._store.read()
        if found is None or found.owner != self._owner:
            now = "is gone" if found is None else f"is now held by {found.owner or 'another run'}"
            raise LockError(
                f"this run has held the lock of {self._path.parent} since {self._owner.since}, but "
                f"the lock {now}. This run stops writing; start it again when the other has ended"
            )

    def release(self) -> None:
        """Removes the lock if this process still holds it."""
        mine, self._owner = self._owner, None
        if mine is None:
            return
        self._done.set()
        # If the file cannot be removed, this process recognizes it as abandoned by its token; other
        # processes do once this process has ended.
        _held.discard(mine.token)
        end = time.monotonic() + 2.0
        with contextlib.suppress(OSError):
            while (found := self._store.read()) is not None and found.owner == mine:
                if self._replace(found, None) or time.monotonic() > end:
                    break

    def _replace(self, found: Found, mine: Owner | None) -> bool:
        """Replaces the lock, or removes it if `mine` is None; returns whether it did.

        Does nothing if the lock is no longer the one that was found.
        """
        if self._guard is None:
            self._guard = Lock(self._path.with_name(f"{self._path.name}.taking"))
        try:
            guarded = self._guard.attempt()
        except LockError:
            guarded = False
        if not guarded:
            time.sleep(0.02)  # another process is replacing it at this moment
            return False
        try:
            now = self._store.read()
            if now is None or now.content != found.content:
                return False
            self._store.replace(mine)
            return True
        finally:
            self._guard._drop()

    def _drop(self) -> None:
        """Removes a guard lock; it is held too briefly for others to take it over."""
        assert self._owner is not None
        _held.discard(self._owner.token)
        self._owner = self._watched = None
        self._store.replace(None)

    def _is_abandoned(self, found: Found) -> bool:
        """Returns whether a lock's owner has ended; False also if that is not known yet.

        Raises:
          LockError: the owner is running.
        """
        whose = found.owner or "an unknown process (the file is damaged)"
        alive = None if found.owner is None else _is_alive(found.owner)
        if alive is None:
            alive = self._is_renewed(found, whose)
        if alive:
            raise LockError(
                f"another run is using {self._path.parent}: {whose}. Wait until it ends, stop it, "
                f"or use another directory. If you are sure that it has ended, use --take-over or "
                f"delete {self._path}"
            )
        return alive is False

    def _is_renewed(self, found: Found, whose: Owner | str) -> bool | None:
        """Returns whether a watched lock is renewed within the lease; None if not known yet."""
        now = time.monotonic()
        if self._watched is None:
            self._watched = found, now
            _say(
                f"{self._path} is held by {whose}. This machine cannot tell whether that process "
                f"is running; waiting up to {LEASE:g} s to see whether the lock is renewed"
            )
        first, since = self._watched
        if found != first:
            self._watched = None
            return True
        if now - since < LEASE:
            return None
        _say(f"taking over {self._path}: it was not renewed for {LEASE:g} s by {whose}")
        return False

    def _renew(self, mine: Owner) -> None:
        heartbeat = 0
        while not self._done.wait(RENEWED_EVERY):
            heartbeat += 1
            with contextlib.suppress(OSError):  # storage is unavailable: try again next time
                self._store.renew(mine, heartbeat)


def _absolute(path: Path) -> Path:
    return path.absolute() if files.is_local(path) else path


def _this_process() -> Owner:
    pid, kernel = os.getpid(), _kernel()
    started = (_started(pid) or "") if kernel else ""
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Owner(socket.gethostname(), kernel, pid, started, since, secrets.token_hex(8))


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _is_alive(owner: Owner) -> bool | None:
    """Returns whether a lock's owner is running; None if this process cannot find out."""
    here = _this_process()
    if owner.process == here.process:
        return owner.token in _held
    if owner.process in _dead:
        return False
    if owner.kernel != here.kernel or not (here.kernel or owner.host == here.host):
        return None
    try:
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # the process exists and belongs to another user
    if not owner.kernel:
        return None  # without a start time, the id may have been reused
    started = _started(owner.pid)
    return None if started is None else started == owner.started


def _started(pid: int) -> str | None:
    """Returns a process's start time, as text in the kernel's clock ticks since boot.

    Returns an empty text if the process has ended, and None if the start time cannot be read.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _say(text: str) -> None:
    warnings.warn(text, LockWarning, stacklevel=3)
