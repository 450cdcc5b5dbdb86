"""The processes of a run know of each other: who is missing at the start, who is lost on the way.

JAX's own coordination service ends a run whose processes do not come together or fall silent,
but cannot say which. So process 0 calls the roll on the coordinator's port, stops listening there
before JAX's service starts to, and the connections stay open: a killed process closes its own at
once, one whose machine is cut off goes silent. Whoever notices tells the others, and all end with
the same message.

Messages are JSON, a line each: `hello`, `go`, `beat`, `end`, `bye`.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EXIT_PEERS = 76  # a process was lost: the same command again continues
_MAX_LINE = 1 << 16
_COMPILING = ", compiling"


class PeersError(RuntimeError):
    """The processes of a run did not come together; the message names those missing."""


class _Line:
    """A connection that sends and receives JSON objects."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._buffer = b""
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; one to a peer that is gone is lost, its end shows in `read`."""
        with self._lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> None:
        """Takes in what has arrived; waits for some data.

        Raises:
          EOFError: the other side is gone.
        """
        try:
            data = self.connection.recv(_MAX_LINE)
        except TimeoutError:
            return
        except OSError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError("closed")
        self._buffer += data

    def messages(self) -> Iterator[dict[str, Any]]:
        """Those that have been read; what the caller does not take is kept for the next call.

        Raises:
          EOFError: the other side does not speak our language.
        """
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            try:
                message = json.loads(line)
            except ValueError as error:
                raise EOFError("not JSON") from error
            if not isinstance(message, dict):
                raise EOFError("not an object")
            yield message
        if len(self._buffer) > _MAX_LINE:
            raise EOFError("a line is too long")

    def next(self, seconds: float) -> dict[str, Any]:
        """The next message, if it comes within the time; else an empty one."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(EOFError):
            while True:
                for message in self.messages():
                    return message
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self.connection.settimeout(left)
                self.read()
        return {}

    def close(self) -> None:
        self.connection.close()


class Peers:
    """This process's link to the others of its run.

    Args:
      address: `host:port` where process 0 calls the roll.
      count, index: number of processes, and which this one is.
      timeout: seconds to wait for the others to come, and to be silent.
      run: what all must have in common, such as the command line.
      end: called with exit code and message when the run cannot go on; ends the process.

    Raises:
      PeersError: processes are missing, doubled, or of another run.
    """

    def __init__(
        self,
        address: str,
        count: int,
        index: int,
        *,
        timeout: float,
        run: Any,
        end: Callable[[int, str], None] | None = None,
    ):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise PeersError(f"the coordinator's address is {address!r}; it must be HOST:PORT")
        self._address = (host.strip("[]"), int(port))
        self._count = count
        self._index = index
        self._timeout = timeout
        self._run = json.loads(json.dumps(run))
        self._end = end if end is not None else _exit
        self._interval = min(5.0, timeout / 5)
        self._place = "start"
        self._compiles = False
        self._closing = False
        self._names = {0: f"process 0 ({address})"}
        self._lines: dict[int, _Line] = {}
        self._hello = {
            "hello": index, "count": count, "run": self._run,
            "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        if index == 0:
            self._call_the_roll()
        else:
            self._answer()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """Notes where this process is; said to the others if the run stops moving."""
        self._place = place

    def compiles(self, does: bool) -> None:
        """Notes whether this process is compiling, which may take longer than the timeout."""
        self._compiles = does

    def fail(self, code: int, message: str) -> None:
        """Tells the others that this process ends, and why; they end with the same code."""
        self._closing = True
        reason = f"process {self._index} ended: {message}"
        self._tell(code, reason[: _MAX_LINE // 4])

    def close(self) -> None:
        """Leaves in peace; call it when all processes have come to the end."""
        self._closing = True
        for line in self._lines.values():
            line.send(bye=self._index)
        self._thread.join(timeout=self._timeout)
        for line in self._lines.values():
            line.close()

    # The start.

    def _call_the_roll(self) -> None:
        """Listens until all have said hello; who says nothing keeps nobody waiting."""
        deadline = time.monotonic() + self._timeout
        try:
            server = socket.create_server(("", self._address[1]), backlog=self._count)
        except OSError as error:
            raise PeersError(
                f"process 0 cannot listen on port {self._address[1]}: {error}; does another run "
                "use it? Choose another port in --coordinator_address"
            ) from error
        strangers: set[_Line] = set()
        with server, selectors.DefaultSelector() as selector:
            server.settimeout(1.0)
            selector.register(server, selectors.EVENT_READ)
            try:
                while len(self._lines) < self._count - 1:
                    self._wait(selector, strangers, deadline)
            finally:
                for line in strangers:
                    line.close()
        for line in self._lines.values():
            line.send(go=True)

    def _wait(
        self, selector: selectors.BaseSelector, strangers: set[_Line], deadline: float
    ) -> None:
        """Takes in whoever connects or says something next."""
        left = deadline - time.monotonic()
        if left <= 0:
            missing = sorted(set(range(1, self._count)) - self._lines.keys())
            self._refuse(
                f"{processes(missing)} of {self._count} did not come within "
                f"{self._timeout:g} s; look at their logs"
            )
        for key, _ in selector.select(left):
            if key.data is None:
                server: Any = key.fileobj
                with contextlib.suppress(TimeoutError):  # it is gone already
                    line = _Line(server.accept()[0])
                    strangers.add(line)
                    selector.register(line.connection, selectors.EVENT_READ, line)
            elif (hello := self._hear(key.data)) is not None:
                selector.unregister(key.fileobj)
                strangers.remove(key.data)
                self._enter(key.data, hello)

    @staticmethod
    def _hear(line: _Line) -> dict[str, Any] | None:
        """A message, None as long as it is not whole, an empty one of who is gone."""
        try:
            line.read()
            return next(line.messages(), None)
        except EOFError:
            return {}

    def _enter(self, line: _Line, hello: dict[str, Any]) -> None:
        index = hello.get("hello")
        if not isinstance(index, int) or not 0 <= index < 1 << 20:
            line.close()  # a port scanner, say
            return
        name = f"process {index} ({hello.get('host')}, pid {hello.get('pid')})"
        if hello.get("count") != self._count or index >= self._count:
            self._refuse(
                f"{name} is one of {hello.get('count')} processes, process 0 one of {self._count}",
                line,
            )
        if hello.get("run") != self._run:
            self._refuse(
                f"{name} runs another command or version, {hello.get('run')}; process 0 runs "
                f"{self._run}",
                line,
            )
        old = self._lines.get(index)
        if index == 0 or (old is not None and _is_open(old)):
            self._refuse(f"{name} and {self._names[index]} have the same process id", line)
        if old is not None:
            old.close()
        self._lines[index] = line
        self._names[index] = name

    def _refuse(self, message: str, *others: _Line) -> None:
        """Sends all away that have come, and those beside them, and gives up."""
        for line in (*self._lines.values(), *others):
            line.send(end=EXIT_PEERS, reason=message)
            line.close()
        raise PeersError(message)

    def _answer(self) -> None:
        """Connects to process 0 and waits until all are there."""
        where = ":".join(map(str, self._address))
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            try:
                line = _Line(socket.create_connection(self._address, timeout=5.0))
            except OSError:
                time.sleep(min(0.2, self._timeout / 10))
                continue
            line.send(**self._hello)
            # Process 0 may have started later, and has more time then; it says who is missing.
            answer = line.next(self._timeout + 2 * self._interval)
            if "go" in answer:
                self._lines[0] = line
                return
            line.close()
            if "end" in answer:
                raise PeersError(str(answer.get("reason")))
            time.sleep(min(0.2, self._timeout / 10))
        raise PeersError(
            f"process {self._index} found no process 0 at {where} within {self._timeout:g} s; "
            "is it running, and is the address right and open to the others?"
        )

    # The watch.

    def _watch(self) -> None:
        """Sends and hears beats until the run ends; a thread's work."""
        selector = selectors.DefaultSelector()
        now = told = beaten = time.monotonic()
        heard = dict.fromkeys(self._lines, now)
        places = dict.fromkeys([*self._lines, self._index], ("start", now))
        pause = 0.0  # at first: something may have come together with the call to go
        for index, line in self._lines.items():
            line.connection.settimeout(self._timeout)
            selector.register(line.connection, selectors.EVENT_READ, index)
        while heard and not (self._closing and self._index != 0):
            ready = {key.data for key, _ in selector.select(timeout=pause)}
            now, pause = time.monotonic(), self._interval / 2
            heard |= dict.fromkeys(ready, now)
            for index in list(heard):
                for message in self._messages(index, index in ready):
                    if "end" in message:
                        self._over(int(message["end"]), str(message.get("reason")))
                        return
                    if "bye" in message:
                        selector.unregister(self._lines[index].connection)
                        del heard[index], places[index]
                        break
                    if places[index][0] != message.get("beat"):
                        places[index] = (str(message.get("beat")), now)
            place = f"{self._place}{_COMPILING if self._compiles else ''}"
            if places[self._index][0] != place:
                places[self._index] = (place, now)
            if now - beaten >= self._interval:
                beaten = now
                for index in heard:
                    self._lines[index].send(beat=place)
            silent = [index for index, last in heard.items() if now - last > self._timeout]
            if silent and not self._closing:
                names = ", ".join(self._names[index] for index in silent)
                self._over(EXIT_PEERS, f"no sign of {names} for {self._timeout:g} s")
                return
            moved = max(since for _, since in places.values())
            if self._index == 0 and now - max(moved, told) > self._timeout:
                told = now
                print(f"easy-jax: {_standstill(places, now)}", file=sys.stderr, flush=True)

    def _messages(self, index: int, has_more: bool) -> Iterator[dict[str, Any]]:
        """What has been said; the end of the connection is a message, too."""
        line = self._lines[index]
        try:
            if has_more:
                line.read()
            yield from line.messages()
        except EOFError:
            if self._closing:
                yield {"bye": index}
            else:
                yield {"end": EXIT_PEERS, "reason": f"{self._names[index]} is gone"}

    def _tell(self, code: int, reason: str) -> None:
        for line in self._lines.values():
            line.send(end=code, reason=reason)
        if self._index == 0:
            # JAX ends the others with a message of its own as soon as process 0 is gone.
            time.sleep(min(0.5, self._interval))

    def _over(self, code: int, reason: str) -> None:
        """Tells everybody, and ends this process, whatever its main thread waits for."""
        if self._closing:
            return  # it is ending anyway, with what it has to say itself
        if self._index == 0:
            self._tell(code, reason)
        advice = "; the same command again continues" if code == EXIT_PEERS else ""
        self._end(code, f"{reason}{advice}")
        for line in self._lines.values():
            line.close()


def _standstill(places: dict[int, tuple[str, float]], now: float) -> str:
    """Who waits for whom: the processes by the place they have come to."""
    by_place: dict[str, list[int]] = {}
    for index, (place, _) in sorted(places.items()):
        by_place.setdefault(place, []).append(index)
    seconds = now - max(since for _, since in places.values())
    where = "; ".join(f"{processes(found)} at {place}" for place, found in by_place.items())
    if any(place.endswith(_COMPILING) for place in by_place):
        where += ". To compile a large program can take that long"
    return f"nothing has moved for {seconds:.0f} s: {where}"


def processes(indices: list[int]) -> str:
    """Processes as a message names them: `processes 0, 3`.

    Example:
      >>> processes([1])
      'process 1'
    """
    some = ", ".join(map(str, indices[:20])) + (" ..." if len(indices) > 20 else "")
    return f"process{'es' if len(indices) > 1 else ''} {some}"


def _is_open(line: _Line) -> bool:
    """Whether the other side still holds its end."""
    line.connection.settimeout(0.0)
    try:
        return line.connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _exit(code: int, message: str) -> None:
    print(f"easy-jax: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
