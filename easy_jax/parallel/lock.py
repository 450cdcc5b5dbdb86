"""One run at a time in a folder: a lock file that names its owner, and does not outlive it.

A folder's `run.lock` says which process writes there: host, process id, when that process
started, since when, and a random token; a thread renews it every 15 seconds. Whoever finds one

- of a process on this machine asks the kernel: a process that is not there, or that started at
  another time (its id is in use again), has left the lock behind, and it is taken over at once;
- of another machine, or of a container with process ids of its own, watches it: if it is not
  renewed for two minutes of the watcher's own clock, its owner is gone, and it is taken over.
  No clock of one machine is compared with another's.

How it is made, so that of two who come at once one wins: in a file system, whole under another
name and linked into place, which NFS, too, does once only (where there are no links, it is created
exclusively); in an object store, by a write on the condition that there is no such object, then
read again. Who takes a lock over holds a second lock meanwhile, on the first.

Libraries stop short of this: `filelock`'s soft locks know neither lease nor an id that is in use
again, and what the kernel locks (`flock`) is not seen by other machines on every file system, nor
in an object store.
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
LEASE = 120.0  # longer than NFS may hide a change: a minute

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_WATCHED_EVERY = 0.5  # seconds

_locks: list["Lock"] = []  # of folders, held by this process
_held: set[str] = set()  # tokens of this process
_dead: set[tuple[str, str, int, str]] = set()  # processes found to be gone


class LockError(RuntimeError):
    """Another run is at work in a folder, or has taken it over; the message says which."""


class LockWarning(UserWarning):
    """A lock is watched, or taken over from a run that is gone."""


@contextlib.contextmanager
def hold(directory: str | os.PathLike[str], *, take_over: bool = False) -> Iterator[None]:
    """Holds a folder, which is made if it is not there; all processes of a run must call it.

    Process 0 takes the lock, for all. Where it may not write, nothing is locked: it only reads,
    or is told by whatever it writes.

    Args:
      directory: no other run works there at the same time.
      take_over: take the lock from whomever has it.

    Raises:
      LockError: in every process: another run has the folder, or it cannot be written to.

    Warns:
      LockWarning: it waits to see whether another machine's run is alive, or takes over from it.

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
        while not held:  # in short attempts: an exchange that lasts is taken for a lost process
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
    """Decorates a function to hold the folder that it gets as `directory`, while it runs.

    Args:
      check: refuses a folder before it is made.
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
    """Raises LockError if this process held a folder that another run has taken over: for before
    something is written."""
    for lock in list(_locks):
        if lock.directory == _absolute(files.path(directory)):
            lock.check()


class Lock:
    """A lock file, taken in attempts of a second or so. `hold` takes a folder's for a while."""

    def __init__(self, path: Path):
        self._path = path
        self._store = lock_file.at(path)
        self._owner: Owner | None = None  # while this process holds it
        self._watched: tuple[Found, float] | None = None  # the lock seen first, and when
        self._guard: Lock | None = None
        self._done = threading.Event()

    @property
    def directory(self) -> Path:
        """The folder that it is in."""
        return _absolute(self._path.parent)

    def attempt(self, take_over: bool = False) -> bool:
        """Takes the lock if it is free or its owner is gone; False: not known yet, try again.

        Raises:
          LockError: its owner is at work.
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
        """Renews the lock, in a thread, until it is given back."""
        if self._owner is not None:
            threading.Thread(target=self._renew, args=[self._owner], daemon=True).start()

    def check(self) -> None:
        """Raises LockError if another run has taken it over."""
        if self._owner is None:
            return  # another process of this run holds it
        found = self._store.read()
        if found is None or found.owner != self._owner:
            now = "is gone" if found is None else f"is now of {found.owner or 'another run'}"
            raise LockError(
                f"the lock of {self._path.parent}, held since {self._owner.since}, {now}: this run "
                "writes no more. Start it again when the other one has ended"
            )

    def release(self) -> None:
        """Gives the lock back, if this process has it still."""
        mine, self._owner = self._owner, None
        if mine is None:
            return
        self._done.set()
        # One that cannot be removed is known to be left behind: by its token here, and elsewhere
        # when this process has ended.
        _held.discard(mine.token)
        end = time.monotonic() + 2.0
        with contextlib.suppress(OSError):
            while (found := self._store.read()) is not None and found.owner == mine:
                if self._replace(found, None) or time.monotonic() > end:
                    break

    def _replace(self, found: Found, mine: Owner | None) -> bool:
        """Puts ours, or nothing, in the place of a lock, if that still is the one found."""
        if self._guard is None:
            self._guard = Lock(self._path.with_name(f"{self._path.name}.taking"))
        try:
            guarded = self._guard.attempt()
        except LockError:
            guarded = False
        if not guarded:
            time.sleep(0.02)  # somebody else replaces it at this moment
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
        """Removes a guard, which nobody has taken over: it was held for a moment."""
        assert self._owner is not None
        _held.discard(self._owner.token)
        self._owner = self._watched = None
        self._store.replace(None)

    def _is_abandoned(self, found: Found) -> bool:
        """Whether a lock's owner is gone; False also if that is not known yet.

        Raises:
          LockError: it is at work.
        """
        whose = found.owner or "a process that it does not name"
        alive = None if found.owner is None else _is_alive(found.owner)
        if alive is None:
            alive = self._is_renewed(found, whose)
        if alive:
            raise LockError(
                f"another run is at work in {self._path.parent}: {whose}. Wait for it or end it, "
                f"or use another folder. If it is gone nevertheless: --take-over, or delete "
                f"{self._path}"
            )
        return alive is False

    def _is_renewed(self, found: Found, whose: Owner | str) -> bool | None:
        """Whether a lock changes within the lease; None while that is not known."""
        now = time.monotonic()
        if self._watched is None:
            self._watched = found, now
            _say(
                f"{self._path} is of {whose}, which cannot be asked from here; waiting up to "
                f"{LEASE:g} s to see whether it is renewed"
            )
        first, since = self._watched
        if found != first:
            self._watched = None
            return True
        if now - since < LEASE:
            return None
        _say(f"{self._path} was not renewed for {LEASE:g} s by {whose}; it is taken over")
        return False

    def _renew(self, mine: Owner) -> None:
        beat = 0
        while not self._done.wait(RENEWED_EVERY):
            beat += 1
            with contextlib.suppress(OSError):  # a disk that is away: the next time
                self._store.renew(mine, beat)


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
    except OSError:  # no Linux
        return ""


def _is_alive(owner: Owner) -> bool | None:
    """Whether a process is at work; None if that cannot be known from here."""
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
        pass  # it is another user's
    if not owner.kernel:
        return None  # it may be another one with the same id
    started = _started(owner.pid)
    return None if started is None else started == owner.started


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since boot; empty if it has ended, None if it
    is not shown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _say(text: str) -> None:
    warnings.warn(text, LockWarning, stacklevel=3)
