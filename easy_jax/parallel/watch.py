"""The watch: a thread that notices when a process of the run is lost, and ends this one.

The connections of the rendezvous stay open. A killed process closes its own at once, one whose
machine is cut off falls silent. Whoever notices tells the others, and all end with the same message
and exit code, whatever their main threads wait for.

JAX's coordination service watches, too, but does not keep what docs/reliability.md promises. It
ends the others with exit code 134 and a dump of the stack, not with 76 and a line. It notices a
killed process when its heartbeats are missing, 8.7 to 10 s later with a timeout of 10 s, where this
takes 0.6 to 0.7 s; and it does not name one that never came, nor process 0 when it freezes (JAX
0.10.2, 2 and 4 processes on the CPU: `tests/faults/lost_process.py`).

Messages: `heartbeat`, `end`, `bye`.
"""

import json
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from easy_jax.parallel.connection import MAX_LINE, printable, say
from easy_jax.parallel.member import TOKEN_VARIABLE, Member
from easy_jax.parallel.rendezvous import EXIT_PEERS, Rendezvous, join, name_processes

_COMPILING = ", compiling"
_MAX_REASON = MAX_LINE // 16  # characters; JSON may need twelve bytes for one


class Peers:
    """This process's link to the others of its run.

    Args:
      address: `HOST:PORT` where process 0 waits for the others.
      count, index: number of processes, and which this one is.
      timeout: seconds to wait for the others to come, and to be silent.
      run: what all must have in common, such as the command line; can be written as JSON.
      token: what only the processes of this run know (`easy_jax.parallel.member`); default: that of
        the environment variable `EASY_JAX_RUN_TOKEN`, else one is made of `run`.
      end: called with exit code and message when the run cannot go on; ends the process.

    Attributes:
      bind_address: in process 0, where JAX's service is to listen; None: on all interfaces.

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
        token: str | None = None,
        end: Callable[[int, str], None] | None = None,
    ):
        if token is None:
            token = os.environ.get(TOKEN_VARIABLE, "")
        member = Member(index, count, json.dumps(run), token.strip())
        self._index = index
        self._timeout = timeout
        self._end = end if end is not None else _exit
        self._interval = min(5.0, timeout / 5)
        self._place = "start"
        self._compiles = False
        self._closing = False
        self.bind_address: str | None = None
        if index == 0:
            rendezvous = Rendezvous(address, member, timeout)
            rendezvous.wait()
            self._names = rendezvous.names
            self._connections = rendezvous.connections
            self.bind_address = rendezvous.bind_address
        else:
            connection = join(address, member, timeout, patience=2 * self._interval)
            self._names = {0: connection.name}
            self._connections = {0: connection}
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
        self._tell(code, reason[:_MAX_REASON])

    def close(self) -> None:
        """Leaves in peace; call it when all processes have come to the end."""
        self._closing = True
        for connection in self._connections.values():
            connection.send(bye=self._index)
        self._thread.join(timeout=self._timeout)
        for connection in self._connections.values():
            connection.close()

    def _watch(self) -> None:
        """Sends and hears heartbeats until the run ends; a thread's work."""
        selector = selectors.DefaultSelector()
        now = told = sent = time.monotonic()
        heard = dict.fromkeys(self._connections, now)
        places = dict.fromkeys([*self._connections, self._index], ("start", now))
        pause = 0.0  # at first: something may have come together with the call to go
        for index, connection in self._connections.items():
            connection.link.settimeout(self._timeout)
            selector.register(connection.link, selectors.EVENT_READ, index)
        while heard and not (self._closing and self._index != 0):
            ready = {key.data for key, _ in selector.select(timeout=pause)}
            now, pause = time.monotonic(), self._interval / 2
            heard |= dict.fromkeys(ready, now)
            for index in list(heard):
                for message in self._messages(index, index in ready):
                    if "end" in message:
                        reason = printable(message.get("reason"), _MAX_REASON)
                        self._over(_code(message["end"]), reason)
                        return
                    if "bye" in message:
                        selector.unregister(self._connections[index].link)
                        del heard[index], places[index]
                        break
                    if places[index][0] != (place := printable(message.get("heartbeat"), 300)):
                        places[index] = (place, now)
            place = f"{printable(self._place)}{_COMPILING if self._compiles else ''}"
            if places[self._index][0] != place:
                places[self._index] = (place, now)
            if now - sent >= self._interval:
                sent = now
                for index in heard:
                    self._connections[index].send(heartbeat=place)
            silent = [index for index, last in heard.items() if now - last > self._timeout]
            if silent and not self._closing:
                names = ", ".join(self._names[index] for index in silent)
                self._over(EXIT_PEERS, f"no sign of {names} for {self._timeout:g} s")
                return
            moved = max(since for _, since in places.values())
            if self._index == 0 and now - max(moved, told) > self._timeout:
                told = now
                say(_standstill(places, now))

    def _messages(self, index: int, has_more: bool) -> Iterator[dict[str, Any]]:
        """What has been said; the end of the connection is a message, too."""
        connection = self._connections[index]
        try:
            if has_more:
                connection.read()
            yield from connection.messages()
        except EOFError:
            if self._closing:
                yield {"bye": index}
            else:
                yield {"end": EXIT_PEERS, "reason": f"{self._names[index]} is gone"}

    def _tell(self, code: int, reason: str) -> None:
        for connection in self._connections.values():
            connection.send(end=code, reason=reason)
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
        for connection in self._connections.values():
            connection.close()


def _standstill(places: dict[int, tuple[str, float]], now: float) -> str:
    """Who waits for whom: the processes by the place they have come to."""
    by_place: dict[str, list[int]] = {}
    for index, (place, _) in sorted(places.items()):
        by_place.setdefault(place, []).append(index)
    seconds = now - max(since for _, since in places.values())
    where = "; ".join(f"{name_processes(found)} at {place}" for place, found in by_place.items())
    if any(place.endswith(_COMPILING) for place in by_place):
        where += ". To compile a large program can take that long"
    return f"nothing has moved for {seconds:.0f} s: {where}"


def _code(value: Any) -> int:
    """An exit code that another process says."""
    return value if type(value) is int and 0 < value < 256 else EXIT_PEERS


def _exit(code: int, message: str) -> None:
    say(message)
    sys.stdout.flush()
    os._exit(code)
