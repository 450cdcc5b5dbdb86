"""The start of a run: process 0 waits for the others, and all know who is missing.

Process 0 sends a challenge to whoever connects; a member answers with `hello` and a proof
(`easy_jax.parallel.member`), and gets `go` when all are there. Any other connection is
unidentified: it is dropped, and said once for each address. It never ends the wait. A process that
says of itself that it is of another run or version is told so, and named at the end.
"""

import contextlib
import selectors
import socket
import time
from typing import Any

from easy_jax.parallel.connection import Connection, printable, say
from easy_jax.parallel.listening import PeersError, host_and_port, listen, parse_address
from easy_jax.parallel.member import TOKEN_VARIABLE, Member, challenge, is_hello, name_of

EXIT_PEERS = 76  # a process was missing or lost: the same command again continues
_HELLO_SECONDS = 10.0  # for a hello, from the connection on
_PENDING = 64  # unidentified connections at once, beside those of the members
_SAID = 20  # lines about who was dropped or refused
_PAUSE = 0.1  # seconds, when there are no file descriptors left


def name_processes(indices: list[int]) -> str:
    """Processes as a message names them: `processes 0, 3`.

    Example:
      >>> name_processes([1])
      'process 1'
    """
    some = ", ".join(map(str, indices[:20])) + (" ..." if len(indices) > 20 else "")
    return f"process{'es' if len(indices) > 1 else ''} {some}"


class _Pending(Connection):
    """A connection that has not said hello."""

    def __init__(self, link: socket.socket, where: tuple, deadline: float):
        super().__init__(link, host_and_port(where))
        self.deadline = deadline
        self.challenge = challenge()
        link.settimeout(1.0)  # for whoever does not take in what is sent
        self.send(challenge=self.challenge)


class Rendezvous:
    """Process 0's side: waits for all other processes.

    Args:
      address: `HOST:PORT` to listen on.
      member: process 0.
      timeout: seconds to wait.

    Attributes:
      connections, names: of the processes that have come, by index.
      bind_address: where JAX's service is to listen; None: on all interfaces.
    """

    def __init__(self, address: str, member: Member, timeout: float):
        self._address = address
        self._member = member
        self._timeout = timeout
        self._pending: dict[_Pending, None] = {}  # oldest first
        self._proofs: dict[int, str] = {}  # with which each is told to go
        self._refused: dict[int, str] = {}
        self._dropped = 0
        self._said: set[str] = set()
        self.connections: dict[int, Connection] = {}
        self.names = {0: f"process 0 ({address})"}
        self.bind_address: str | None = None

    def wait(self) -> None:
        """Returns when all have come.

        Raises:
          PeersError: some did not come in time, or members have made a mistake.
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
        """Takes in whoever connects or says something next, and drops who has had time enough."""
        now = time.monotonic()
        for pending in [pending for pending in self._pending if pending.deadline <= now]:
            self._drop(selector, pending, "it said no hello in time")
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
            return  # it is gone already
        except OSError as error:  # such as no file descriptors left: those of others come free
            self._say("accept", f"a connection could not be accepted: {error.strerror}")
            if self._pending:
                self._drop(selector, next(iter(self._pending)), "it said no hello until now")
            time.sleep(_PAUSE)
            return
        if len(self._pending) >= _PENDING + 2 * self._member.count:
            self._drop(selector, next(iter(self._pending)), "it said no hello until now")
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
            if "hello" in message:  # of another version, perhaps
                pending.send(end=EXIT_PEERS, reason="process 0 has another version of easy-jax")
            self._drop(selector, pending, "it said no hello of this version")
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
            self._drop(selector, pending, "" if reason else f"it says {name} without a proof")
            return
        selector.unregister(pending.link)
        del self._pending[pending]
        if reason:
            self._end(f"{name} {reason}; process 0 {ours}", pending)
        self._enter(pending, message, name)

    def _enter(self, pending: _Pending, hello: dict[str, Any], name: str) -> None:
        """Lets in a member, unless another has its number."""
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
        """Tells a process that it is not of this run, and remembers it."""
        pending.send(
            end=EXIT_PEERS,
            reason=f"process 0 refused {name}: it {reason}, unlike process 0; "
            "all need the same command and environment, and the log of process 0 has both",
        )
        if 0 < index < self._member.count and index not in self.connections:
            self._refused[index] = f"{name} was refused: it {reason}; process 0 {ours}"
        self._say(f"{index} {reason}", f"refused {name}: it {reason}; process 0 {ours}")

    def _drop(self, selector: selectors.BaseSelector, pending: _Pending, why: str) -> None:
        """Closes a connection that is none of a member; `why` is said, if it is not known."""
        selector.unregister(pending.link)
        del self._pending[pending]
        pending.close()
        if why:
            self._dropped += 1
            host = pending.name.rpartition(":")[0]
            self._say(host, f"dropped an unidentified connection from {pending.name}: {why}")

    def _say(self, about: str, message: str) -> None:
        """Once for each, so that nobody fills the log."""
        if about not in self._said and len(self._said) < _SAID:
            self._said.add(about)
            say(f"{message}; process 0 goes on waiting")

    def _close_pending(self) -> None:
        for pending in self._pending:
            pending.close()
        if self._dropped > 1:
            say(f"{self._dropped} unidentified connections were dropped in all")

    def _who_is_missing(self) -> str:
        missing = sorted(set(range(1, self._member.count)) - self.connections.keys())
        refused = [self._refused[index] for index in missing if index in self._refused][:_SAID]
        return "; ".join(
            [
                f"{name_processes(missing)} of {self._member.count} did not come within "
                f"{self._timeout:g} s",
                *refused,
                "look at their logs",
            ]
        )

    def _end(self, message: str, *others: Connection) -> None:
        """Sends all members away that have come, and those beside them, and gives up."""
        for connection in (*self.connections.values(), *others):
            connection.send(end=EXIT_PEERS, reason=message)
            connection.close()
        raise PeersError(message)


def join(address: str, member: Member, timeout: float, patience: float) -> Connection:
    """The other processes' side: connects to process 0 and waits until all are there.

    Args:
      address: `HOST:PORT` of process 0.
      member: this process.
      timeout: seconds to wait for process 0.
      patience: seconds more that it may need to say who is missing.

    Raises:
      PeersError: process 0 was not found in time, or ends the run.
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
            # Without a listener, TCP may connect a port to itself.
            to_itself = link.getsockname() == link.getpeername()
            with contextlib.ExitStack() as stack:
                stack.callback(connection.close)
                if not to_itself and _is_let_in(connection, member, timeout, patience):
                    stack.pop_all()
                    return connection
            found = "what listens there does not answer as process 0 of this run does"
        time.sleep(min(0.2, timeout / 10))
    raise PeersError(
        f"process {member.index} found no process 0 at {address} within {timeout:g} s ({found}); "
        "is it running, and is the address right and open to the others?"
    )


def _is_let_in(connection: Connection, member: Member, timeout: float, patience: float) -> bool:
    """Says hello; whether it is process 0 that answers, and all have come."""
    theirs = connection.next(min(_HELLO_SECONDS, timeout / 2)).get("challenge")
    if not isinstance(theirs, str):
        return False
    hello = {**member.hello(), "challenge": challenge()}
    connection.send(**hello, proof=member.proof("hello", theirs, hello))
    # Process 0 may have started later, and has more time then; it says who is missing.
    answer = connection.next(timeout + patience)
    if "end" in answer:
        raise PeersError(printable(answer.get("reason"), 10_000))
    return member.is_proof(answer.get("proof"), "go", theirs, hello["challenge"])
