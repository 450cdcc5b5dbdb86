"""Attacks on the coordinator's port while process 0 waits; the run must start nevertheless.

  python tests/faults/unidentified_connections.py [--count 13] [--seed 0]

Two processes join with `easy_jax.parallel.processes.initialize` and exchange a value; before the
second one starts, and until both are done, unidentified connections disturb process 0. All use the
loopback interface, and their number and size are limited.
"""

import contextlib
import json
import os
import random
import resource
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import attacks
import processes
from forks import CONTEXT

TIMEOUT = 40.0  # of the roll call, seconds
MAX_FILES = 160  # that process 0 may have open where many connections come
COMMAND = ["score", "--config=attack.py", "--num_processes=2"]


def member(address, index, max_files, out, err):
    """A process of the run."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if max_files:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, hard))
    sys.argv = ["easy-jax", *COMMAND, f"--process_id={index}"]
    from easy_jax.cli import errors
    from easy_jax.parallel import processes
    from easy_jax.parallel.rendezvous import PeersError

    try:
        processes.initialize(address, 2, index, timeout=TIMEOUT)
    except (PeersError, *errors.USER_ERRORS) as error:
        print(f"easy-jax: {error}", file=sys.stderr)
        sys.exit(76)
    found = processes.gather("the attack's value", index)
    processes.shutdown()
    print(f"gathered {found}")


class Member:
    """A started process of the run."""

    def __init__(self, folder, address, index, max_files=0):
        self._paths = [Path(folder) / f"{index}.{name}" for name in ("out", "err")]
        arguments = (address, index, max_files, *map(str, self._paths))
        self.process = CONTEXT.Process(target=member, args=arguments, daemon=True)
        self.process.start()

    def wait(self, seconds):
        """Returns whether it ended normally, and what it gathered."""
        self.process.join(seconds)
        out, self.complaint = (path.read_text() for path in self._paths)
        return self.process.exitcode == 0 and "gathered [0, 1]" in out


class Intruder:
    """Connections to a port; what is done with them is in the functions below."""

    def __init__(self, port, draw):
        self.port = port
        self.draw = draw
        self.open = []
        self.over = threading.Event()

    def connect(self):
        line = socket.create_connection(("127.0.0.1", self.port), timeout=2.0)
        self.open.append(line)
        return line

    def say(self, *texts, close=False):
        """Each text by a connection of its own, which stays open by default."""
        for text in texts:
            with contextlib.suppress(OSError):  # it may be thrown out at any moment
                line = self.connect()
                line.sendall(text)
                if close:
                    line.close()

    def tell(self, *messages):
        self.say(*(json.dumps(message).encode() + b"\n" for message in messages))

    def close(self):
        self.over.set()
        for line in self.open:
            line.close()


def raw(intruder):
    intruder.say(
        intruder.draw.randbytes(1 << 16), b"\0" * 1000 + b"\n", b"\n" * 1000, b"\xff\xfe\n"
    )
    intruder.say(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + intruder.draw.randbytes(500))


def http(intruder):
    request = b"GET / HTTP/1.1\r\nHost: coordinator\r\nConnection: keep-alive\r\n\r\n"
    intruder.say(request, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", request, close=True)
    intruder.say(request)


def deep(intruder):
    intruder.say(b"[" * 60_000 + b"\n", b'{"hello":' * 6_000 + b"\n", b'{"a":[' * 9_000 + b"\n")
    intruder.say(b'{"hello": 1, "count": 2, "run": ' + b"[" * 30_000 + b"]" * 30_000 + b"}\n")


def huge(intruder):
    intruder.say(b"x" * (32 << 20), b'{"hello": ' + b"1" * (1 << 20) + b"}\n", b'"' * 70_000)
    intruder.tell({"hello": 10**400, "count": 2, "run": []})


def slow(intruder):
    """Fifty greetings, a byte at a time."""

    def drip(line):
        for byte in b'{"hello": 1, "count": 2, "run": ["x"], "host": "slow", "pid": 1}' * 20:
            if intruder.over.wait(0.05):
                return
            try:
                line.sendall(bytes([byte]))
            except OSError:
                return

    for _ in range(50):
        threading.Thread(target=drip, args=(intruder.connect(),), daemon=True).start()


def many(intruder):
    """More connections than process 0 may have files."""
    for _ in range(2 * MAX_FILES):
        with contextlib.suppress(OSError):
            intruder.connect()


def imposter(intruder):
    run = ["0.1.0", *COMMAND]
    for index in (1, 0, 2, -1, 10**9, "1", 1.0, True, None, [1], {"hello": 1}):
        for guess in (["x"], run):
            intruder.tell({"hello": index, "count": 2, "run": guess, "host": "h", "pid": 1})
            intruder.tell({"hello": index, "count": 2, "run": guess, "token": "", "key": "0"})


def count(intruder):
    for number in (99, 0, -1, 1, 3, None, "2", [2], 2.5):
        intruder.tell({"hello": 1, "count": number, "run": ["x"], "host": "h", "pid": 1})


def other_run(intruder):
    for run in ([], None, "x", {"a": 1}, ["0.0.1", *COMMAND], ["0.1.0", "train"], [None] * 1000):
        intruder.tell({"hello": 1, "count": 2, "run": run, "host": "h", "pid": 1})


def messages(intruder):
    """Messages that belong to a later phase, and names that are not valid."""
    intruder.tell(
        {"end": 2, "reason": "it is over"}, {"bye": 1}, {"go": True}, {"heartbeat": "step 7"}
    )
    for name in ("\x1b[2J\x1b[31mred", "[bold]b[/]", "a\nb\rc", "\u202eabc", "x" * 50_000):
        intruder.tell({"hello": 1, "count": 99, "run": name, "host": name, "pid": name})
        intruder.tell({"hello": 1, "count": 2, "run": [name], "host": name, "pid": name})


def half_closed(intruder):
    for text in (b"", b'{"hello"', b'{"hello": 1, "count": 2, "run": []}\n'):
        for _ in range(10):
            intruder.say(text)
            with contextlib.suppress(OSError):
                intruder.open[-1].shutdown(socket.SHUT_WR)
            intruder.say(text)
            now = struct.pack("ii", 1, 0)  # close with a reset
            intruder.open[-1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            intruder.open.pop().close()


def flood(intruder):
    """Connects and disconnects as fast as possible until the end."""

    def go():
        for _ in range(20_000):
            if intruder.over.is_set():
                return
            with contextlib.suppress(OSError):
                line = socket.create_connection(("127.0.0.1", intruder.port), timeout=2.0)
                line.sendall(b"x")
                line.close()

    threading.Thread(target=go, daemon=True).start()
    time.sleep(1.0)


def replay(intruder):
    """What a process 1 of the same command said to another process 0, word for word."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(20.0)
            address = f"127.0.0.1:{server.getsockname()[1]}"
            lured = Member(folder, address, 1)
            line, _ = server.accept()
            line.settimeout(3.0)
            line.sendall(b'{"challenge": "0123456789abcdef"}\n')  # or it says nothing
            heard = b""
            with contextlib.suppress(TimeoutError):
                while not heard.endswith(b"\n"):
                    heard += line.recv(1 << 16)
            line.close()
        lured.process.kill()
        lured.process.join()
    assert b"hello" in heard, heard
    intruder.say(heard, heard + heard, heard * 3)


STRANGERS = (
    raw,
    http,
    deep,
    huge,
    slow,
    many,
    imposter,
    count,
    other_run,
    messages,
    half_closed,
    flood,
    replay,
)


def attack(intruder_act, seed, folder):
    """Runs one attack; returns the outcome and its detail."""
    port = processes.free_port()
    address = f"127.0.0.1:{port}"
    first = Member(folder, address, 0, MAX_FILES if intruder_act is many else 0)
    intruder = Intruder(port, random.Random(seed))
    try:
        _wait_for(intruder)
        intruder_act(intruder)
        first.process.join(1.0)
        if first.process.exitcode is not None:
            first.wait(0)
            return "run ended", first.complaint
        second = Member(folder, address, 1)
        start = time.monotonic()
        came, done = second.wait(TIMEOUT + 20), first.wait(20)
        if not (came and done):
            complaints = f"process 0: {first.complaint[-300:]}; 1: {second.complaint[-300:]}"
            return "kept out", complaints
        if any(ord(c) < 32 and c != "\n" for c in first.complaint):
            return "not escaped", repr(first.complaint)
        return "let in", f"process 1 done in {time.monotonic() - start:.1f} s"
    finally:
        intruder.close()
        for each in (first, locals().get("second")):
            if each is not None and each.process.exitcode is None:
                each.process.kill()
                each.process.join()


def _wait_for(intruder):
    """Waits until process 0 listens."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            intruder.connect().close()
            return
        time.sleep(0.1)
    raise TimeoutError("process 0 does not listen")


def main(argv=None):
    args = attacks.arguments(__doc__, count=len(STRANGERS), argv=argv)
    tally = attacks.Tally("let in")
    for number in range(args.count):
        act = STRANGERS[number % len(STRANGERS)]
        with tempfile.TemporaryDirectory() as folder:
            tally.add(f"{number + 1} {act.__name__}", *attack(act, args.seed + number, folder))
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
