"""A thread that detects the loss of another process of the run, and then ends this process.

The connections of the rendezvous stay open. If a process is killed, its connection closes at once;
if its machine loses the network, its heartbeats stop. The first process to notice tells the others,
and all end with the same message and exit code, even if their main threads are blocked.

JAX's coordination service also detects lost processes, but it does not fulfil the promises of
docs/reliability.md:

- It ends the other processes with exit code 134 and a stack dump, not with 76 and one line.
- It detects a killed process only by missing heartbeats: after 8.7 to 10 s with a timeout of 10 s,
  where this thread takes 0.6 to 0.7 s.
- It does not name a process that never connected, nor process 0 if that freezes.

These measurements were made by `tests/faults/lost_process.py` with JAX 0.10.2 and 2 and 4 processes
on the CPU.

The messages are `heartbeat`, `end` and `bye`.
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
_MAX_REASON = MAX_LINE // 16  # characters; JSON needs up to twelve bytes per character


class Peers:
    """The connections of this process to the others of its run.

    Args:
      address: `HOST:PORT` on which process 0 waits for the others.
      count: number of processes of the run.
      index: id of this process, from 0 to `count` - 1.
      timeout: seconds to wait for the others to connect, and later without any heartbeat before a
        process counts as lost.
      run: JSON-serialisable value that must be equal in all processes, such as the command line.
      token: a secret that only the processes of this run know (`easy_jax.parallel.member`).
        Default: the value of the environment variable `EASY_JAX_RUN_TOKEN`; if that is not set,
        `run` is the key.
      end: called with an exit code and a message when the run cannot continue. Default: print the
        message and end the process.

    Attributes:
      bind_address: in process 0, the address on which JAX's coordination service should listen;
        None means all interfaces.

    Raises:
      PeersError: processes are missing, have the same id, or belong to another run.
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
        """Records what this process is doing; printed if no process makes progress."""
        self._place = place

    def compiles(self, does: bool) -> None:
        """Records whether this process is compiling, which may take longer than the timeout."""
        self._compiles = does

    def fail(self, code: int, message: str) -> None:
        """Tells the others that this process ends, and why; they end with the same exit code."""
        self._closing = True
        reason = f"process {self._index} ended: {message}"
        self._tell(code, reason[:_MAX_REASON])

    def close(self) -> None:
        """Ends the watch and closes the connections; call it when all processes are done."""
        self._closing = True
        for connection in self._connections.values():
            connection.send(bye=self._index)
        self._thread.join(timeout=self._timeout)
        for connection in self._connections.values():
            connection.close()

    def _watch(self) -> None:
        """Sends and receives heartbeats until the run ends; runs in a thread."""
        selector = selectors.DefaultSelector()
        now = told = sent = time.monotonic()
        heard = dict.fromkeys(self._connections, now)
        places = dict.fromkeys([*self._connections, self._index], ("start", now))
        pause = 0.0  # at first, because messages may have arrived together with `go`
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
                self._over(EXIT_PEERS, f"no heartbeat from {names} for {self._timeout:g} s")
                return
            moved = max(since for _, since in places.values())
            if self._index == 0 and now - max(moved, told) > self._timeout:
                told = now
                say(_standstill(places, now))

    def _messages(self, index: int, has_more: bool) -> Iterator[dict[str, Any]]:
        """Yields the messages received; a closed connection counts as the message `end`."""
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
            # As soon as process 0 has ended, JAX ends the others with a message of its own.
            time.sleep(min(0.5, self._interval))

    def _over(self, code: int, reason: str) -> None:
        """Ends this process, even if its main thread is blocked; process 0 first tells the others.

        Does nothing if this process is already ending.
        """
        if self._closing:
            return
        if self._index == 0:
            self._tell(code, reason)
        advice = "; run the same command again to continue" if code == EXIT_PEERS else ""
        self._end(code, f"{reason}{advice}")
        for connection in self._connections.values():
            connection.close()


def _standstill(places: dict[int, tuple[str, float]], now: float) -> str:
    """Returns a message that lists the processes by what they are doing (`Peers.at`)."""
    by_place: dict[str, list[int]] = {}
    for index, (place, _) in sorted(places.items()):
        by_place.setdefault(place, []).append(index)
    seconds = now - max(since for _, since in places.values())
    where = "; ".join(f"{name_processes(found)} at {place}" for place, found in by_place.items())
    if any(place.endswith(_COMPILING) for place in by_place):
        where += ". Compiling a large program can take that long"
    return f"no process has made progress for {seconds:.0f} s: {where}"


def _code(value: Any) -> int:
    """Returns the exit code in a received message; EXIT_PEERS if it is not valid."""
    return value if type(value) is int and 0 < value < 256 else EXIT_PEERS


def _exit(code: int, message: str) -> None:
    say(message)
    sys.stdout.flush()
    os._exit(code)
