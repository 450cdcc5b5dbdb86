"""The rendezvous at the start of a run: process 0 waits until all other processes have connected.

Process 0 sends a challenge on every new connection. A member of the run answers with `hello` and a
proof (`easy_jax.parallel.member`), and receives `go` when all members are connected. If some do not
connect in time, all processes end with a message that names the missing ones.

Every other connection is unidentified. It is dropped, which is logged once per address, and process
0 continues to wait. A process that states that it belongs to another run or version is told that it
is refused, and the message about missing processes mentions it.
"""

import contextlib
import selectors
import socket
import time
from typing import Any

from easy_jax.parallel.connection import Connection, printable, say
from easy_jax.parallel.listening import PeersError, host_and_port, listen, parse_address
from easy_jax.parallel.member import TOKEN_VARIABLE, Member, challenge, is_hello, name_of

EXIT_PEERS = 76  # exit code if a process was missing or lost; running again continues the run
_HELLO_SECONDS = 10.0  # time limit for `hello` after a connection is made
_PENDING = 64  # limit of simultaneous unidentified connections, in addition to two per member
_MAX_LINES = 20  # limit of log lines about dropped and refused connections
_PAUSE = 0.1  # seconds to wait if a connection cannot be accepted


def name_processes(indices: list[int]) -> str:
    """Formats process ids for a message, as in `processes 0, 3`; shows at most 20.

    Example:
      >>> name_processes([1])
      'process 1'
    """
    some = ", ".join(map(str, indices[:20])) + (" ..." if len(indices) > 20 else "")
    return f"process{'es' if len(indices) > 1 else ''} {some}"


class _Pending(Connection):
    """A connection on which no `hello` has arrived yet."""

    def __init__(self, link: socket.socket, where: tuple, deadline: float):
        super().__init__(link, host_and_port(where))
        self.deadline = deadline
        self.challenge = challenge()
        link.settimeout(1.0)  # so that a peer that does not receive cannot block process 0
        self.send(challenge=self.challenge)


class Rendezvous:
    """The side of process 0, which waits for all other processes.

    Args:
      address: `HOST:PORT` of the coordinator, on which process 0 listens.
      member: process 0 as a member of the run.
      timeout: seconds to wait.

    Attributes:
      connections: the connection to every member so far, by process id.
      names: the printable name of every member so far and of process 0, by process id.
      bind_address: the address on which JAX's coordination service should listen; None means all
        interfaces.
    """

    def __init__(self, address: str, member: Member, timeout: float):
        self._address = address
        self._member = member
        self._timeout = timeout
        self._pending: dict[_Pending, None] = {}  # oldest first
        self._proofs: dict[int, str] = {}  # to be sent with `go`, by process id
        self._refused: dict[int, str] = {}  # reasons, by the process id that was claimed
        self._dropped = 0
        self._logged: set[str] = set()
        self.connections: dict[int, Connection] = {}
        self.names = {0: f"process 0 ({address})"}
        self.bind_address: str | None = None

    def wait(self) -> None:
        """Waits until all processes are connected, and then sends `go` to all.

        Raises:
          PeersError: some did not connect in time, or members disagree on the run or their ids.
        """
        deadline = time.monotonic() + self._timeout
        servers, self.bind_address = listen(self._address, backlog=512)
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.enter_context(server)
                server.setblocking(False)
            selector = stack.enter_context(selectors.DefaultSelector())
            stack.callback(self._close_pending)
            for server in servers:
                selector.register(server, selectors.EVENT_READ)
            while len(self.connections) < self._member.count - 1:
                if time.monotonic() >= deadline:
                    self._end(self._who_is_missing())
                self._step(selector, deadline)
        for index, connection in self.connections.items():
            connection.send(go=True, proof=self._proofs[index])

    def _step(self, selector: selectors.BaseSelector, deadline: float) -> None:
        """Drops connections past their deadline, then handles the next events until `deadline`."""
        now = time.monotonic()
        for pending in [pending for pending in self._pending if pending.deadline <= now]:
            self._drop(selector, pending, "it did not send hello in time")
        first = min([deadline, *(pending.deadline for pending in self._pending)])
        for key, _ in selector.select(max(0.0, first - now)):
            if key.data is None:
                self._accept(selector, key.fileobj)
            elif key.data in self._pending:
                self._hear(selector, key.data)

    def _accept(self, selector: selectors.BaseSelector, server: Any) -> None:
        try:
            link, where = server.accept()
        except BlockingIOError:
            return  # the other side has closed it already
        except OSError as error:  # for example, no file descriptors are left: free one
            self._log_once("accept", f"a connection could not be accepted: {error.strerror}")
            if self._pending:
                self._drop(selector, next(iter(self._pending)), "it has not sent hello so far")
            time.sleep(_PAUSE)
            return
        if len(self._pending) >= _PENDING + 2 * self._member.count:
            self._drop(selector, next(iter(self._pending)), "it has not sent hello so far")
        patience = min(_HELLO_SECONDS, self._timeout / 2)
        pending = _Pending(link, where, time.monotonic() + patience)
        self._pending[pending] = None
        selector.register(link, selectors.EVENT_READ, pending)

    def _hear(self, selector: selectors.BaseSelector, pending: _Pending) -> None:
        try:
            pending.read()
            message = next(pending.messages(), None)
        except EOFError as error:
            self._drop(selector, pending, str(error))
            return
        if message is None:
            return
        if not is_hello(message):
            if "hello" in message:  # perhaps from another version
                pending.send(end=EXIT_PEERS, reason="process 0 has another version of easy-jax")
            self._drop(selector, pending, "it did not send a hello of this version")
            return
        proof = message.pop("proof")
        is_member = self._member.is_proof(proof, "hello", pending.challenge, message)
        reason, ours = self._member.difference(message)
        if not is_member and not reason and self._member.token:
            reason, ours = f"has another token in {TOKEN_VARIABLE}", "has its own"
        name = name_of(message)
        if not is_member:
            if reason:
                self._refuse(pending, message["hello"], name, reason, ours)
            self._drop(selector, pending, "" if reason else f"it claims to be {name} without proof")
            return
        selector.unregister(pending.link)
        del self._pending[pending]
        if reason:
            self._end(f"{name} {reason}; process 0 {ours}", pending)
        self._enter(pending, message, name)

    def _enter(self, pending: _Pending, hello: dict[str, Any], name: str) -> None:
        """Adds a member; ends the run if its process id is out of range or already taken."""
        index = hello["hello"]
        old = self.connections.get(index)
        if index >= self._member.count:
            self._end(f"{name} is not one of {self._member.count} processes", pending)
        if index == 0 or (old is not None and old.is_open()):
            self._end(f"{name} and {self.names[index]} have the same process id", pending)
        if old is not None:
            old.close()
        self.connections[index] = pending
        self.names[index] = name
        self._proofs[index] = self._member.proof("go", pending.challenge, hello["challenge"])

    def _refuse(self, pending: _Pending, index: int, name: str, reason: str, ours: str) -> None:
        """Tells a process that it does not belong to this run, and records that."""
        pending.send(
            end=EXIT_PEERS,
            reason=f"process 0 refused {name}: it {reason}, unlike process 0; all processes need "
            "the same command and environment (the log of process 0 shows the difference)",
        )
        if 0 < index < self._member.count and index not in self.connections:
            self._refused[index] = f"{name} was refused: it {reason}; process 0 {ours}"
        self._log_once(f"{index} {reason}", f"refused {name}: it {reason}; process 0 {ours}")

    def _drop(self, selector: selectors.BaseSelector, pending: _Pending, why: str) -> None:
        """Closes an unidentified connection; logs the reason `why` unless it is empty."""
        selector.unregister(pending.link)
        del self._pending[pending]
        pending.close()
        if why:
            self._dropped += 1
            host = pending.name.rpartition(":")[0]
            self._log_once(host, f"dropped an unidentified connection from {pending.name}: {why}")

    def _log_once(self, key: str, message: str) -> None:
        """Prints a message once per key, and at most `_MAX_LINES`, so that nobody fills the log."""
        if key not in self._logged and len(self._logged) < _MAX_LINES:
            self._logged.add(key)
            say(f"{message}; process 0 continues to wait")

    def _close_pending(self) -> None:
        for pending in self._pending:
            pending.close()
        if self._dropped > 1:
            say(f"{self._dropped} unidentified connections were dropped in all")

    def _who_is_missing(self) -> str:
        missing = sorted(set(range(1, self._member.count)) - self.connections.keys())
        refused = [self._refused[index] for index in missing if index in self._refused]
        return "; ".join(
            [
                f"{name_processes(missing)} of {self._member.count} did not connect within "
                f"{self._timeout:g} s",
                *refused[:_MAX_LINES],
                "see their logs",
            ]
        )

    def _end(self, message: str, *others: Connection) -> None:
        """Tells all members so far, and the given connections, that the run ends; then raises."""
        for connection in (*self.connections.values(), *others):
            connection.send(end=EXIT_PEERS, reason=message)
            connection.close()
        raise PeersError(message)


def join(address: str, member: Member, timeout: float, patience: float) -> Connection:
    """Connects to process 0 and waits until all processes are connected.

    This is the side of all processes other than process 0.

    Args:
      address: `HOST:PORT` of process 0.
      member: this process as a member of the run.
      timeout: seconds to try to reach process 0.
      patience: seconds to wait beyond `timeout` for process 0 to report who is missing.

    Returns:
      The connection to process 0.

    Raises:
      PeersError: process 0 was not found in time, or it ended the run.
    """
    where = parse_address(address)
    deadline = time.monotonic() + timeout
    found = "nothing"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = socket.create_connection(where, timeout=min(5.0, left))
        except OSError as error:
            found = printable(error.strerror or str(error))
        else:
            connection = Connection(link, f"process 0 ({address})")
            # If nobody listens on a local port, TCP may connect the port to itself.
            to_itself = link.getsockname() == link.getpeername()
            with contextlib.ExitStack() as stack:
                stack.callback(connection.close)
                if not to_itself and _is_let_in(connection, member, timeout, patience):
                    stack.pop_all()
                    return connection
            found = "another program, or process 0 of another run, listens there"
        time.sleep(min(0.2, timeout / 10))
    raise PeersError(
        f"process {member.index} did not find process 0 at {address} within {timeout:g} s "
        f"({found}); check that it is running, and that the address is correct and reachable"
    )


def _is_let_in(connection: Connection, member: Member, timeout: float, patience: float) -> bool:
    """Sends `hello`; returns whether process 0 proves its identity and reports all connected.

    Raises:
      PeersError: process 0 ended the run, or refused this process.
    """
    theirs = connection.next(min(_HELLO_SECONDS, timeout / 2)).get("challenge")
    if not isinstance(theirs, str):
        return False
    hello = {**member.hello(), "challenge": challenge()}
    connection.send(**hello, proof=member.proof("hello", theirs, hello))
    # Process 0 may have started after this process, and its timeout then ends later.
    answer = connection.next(timeout + patience)
    if "end" in answer:
        raise PeersError(printable(answer.get("reason"), 10_000))
    return member.is_proof(answer.get("proof"), "go", theirs, hello["challenge"])
