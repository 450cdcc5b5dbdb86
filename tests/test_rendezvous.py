"""The rendezvous of a run: connections that do not belong to it, tokens, and refusals."""

import contextlib
import json
import resource
import socket
import struct
import threading
import time

import pytest
from peer_threads import TIMEOUT, Run, leave

from easy_jax.parallel.member import Member
from easy_jax.parallel.rendezvous import PeersError
from easy_jax.parallel.watch import Peers

WAIT = 1.5  # seconds that process 0 waits, while strangers try to end that
HELLO = {
    "hello": 1,
    "count": 2,
    "run": '"same"',
    "digest": "0" * 64,
    "has_token": False,
    "host": "h",
    "pid": 1,
    "challenge": "mine",
    "proof": "0" * 64,
}


def line(**changes):
    return json.dumps(HELLO | changes).encode() + b"\n"


SAME = Member(1, 2, '"same"').hello()
# What is sent at once, after the connection is made.
SENT = {
    "deep": b"[" * 60_000 + b"\n",
    "deep object": b'{"a":' * 12_000 + b"\n",
    "deep field": b'{"hello": 1, "host": ' + b"[" * 900 + b"]" * 900 + b"}\n",
    "count": b'{"hello": 1, "count": 99}\n',
    "run": b'{"hello": 1, "count": 2, "run": []}\n',
    "old imposter": b'{"hello": 1, "count": 2, "run": "same"}\n',
    "imposter": line(digest=SAME["digest"]),
    "imposter without ASCII": line(digest=SAME["digest"], proof="\ud800\u00e9"),
    "true": line(hello=True),
    "huge number": b'{"hello": 1' + b"0" * 4000 + b"}\n",
    "too huge a number": b'{"hello": ' + b"1" * 20_000 + b"}\n",
    "huge count": line(count=10**4000),
    "negative": line(hello=-1),
    "infinite": b'{"hello": Infinity, "count": NaN}\n',
    "long line": b'{"a": "' + b"x" * (1 << 20),
    "many lines": b'{"heartbeat": "x"}\n' * 10_000,
    "end": b'{"end": 3, "reason": "over"}\n',
    "heartbeat": b'{"heartbeat": "step 1"}\n',
    "go": b'{"go": true}\n',
    "list": b"[1, 2]\n",
    "not UTF-8": b"\xff\xfe\x00\x80\n",
    "binary": bytes(range(256)) * 200,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "nothing": b"",
    "half a hello": line()[:20],
    "terminal codes": line(host="\x1b[2J\x07\n", digest="1"),
}


def attack(run, what):
    with contextlib.suppress(OSError), run.connect() as link:
        link.sendall(what)
        link.settimeout(0.2)
        link.recv(10_000)
        link.recv(10_000)


def slowly(run, until):
    """Byte by byte, in a line that never ends."""
    with contextlib.suppress(OSError), run.connect() as link:
        while time.monotonic() < until:
            link.sendall(b"{")
            time.sleep(0.05)


def with_a_reset(run):
    with run.connect() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.slow
def test_no_stranger_ends_the_wait_or_is_taken_for_a_process(capsys):
    run = Run(2, timeout=WAIT)
    begin = time.monotonic()

    def others():
        time.sleep(0.2)
        silent = [run.connect() for _ in range(20)]  # half open, for all of the time
        loris = threading.Thread(target=slowly, args=(run, begin + WAIT))
        loris.start()
        threads = [threading.Thread(target=attack, args=(run, sent)) for sent in SENT.values()]
        for thread in threads:
            thread.start()
        with_a_reset(run)
        for thread in [*threads, loris]:
            thread.join()
        for link in silent:
            link.close()

    error, _ = run.together(lambda: run.peer(0), others)
    assert isinstance(error, PeersError)
    assert "process 1 of 2 did not connect within 1.5 s" in str(error)
    assert time.monotonic() - begin >= WAIT
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\x07" not in said
    assert said.count("dropped an unidentified connection from 127.0.0.1:") == 1
    assert "unidentified connections were dropped in all" in said


def is_dropped(link, seconds):
    """Whether process 0 closes the connection within that time."""
    link.settimeout(seconds)
    try:
        while link.recv(100_000):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.slow
def test_each_stranger_is_dropped_and_the_run_begins():
    run = Run(2)
    patient = {"nothing", "half a hello"}  # these might still say the rest

    def others():
        time.sleep(0.2)
        waiting = [run.connect() for _ in patient]
        for link, name in zip(waiting, sorted(patient), strict=True):
            link.sendall(SENT[name])
        for name in SENT.keys() - patient:
            with run.connect() as link:
                with contextlib.suppress(ConnectionError):
                    link.sendall(SENT[name])
                assert is_dropped(link, seconds=2.0), name
        assert not is_dropped(waiting[0], seconds=0.01)
        for link in waiting:
            assert is_dropped(link, seconds=0.7 * TIMEOUT)
            link.close()
        return run.peer(1)

    peers = run.together(lambda: run.peer(0), others)
    for peer in peers:
        assert isinstance(peer, Peers), peer
    leave(peers)
    assert run.ended.empty()


def test_many_connections_at_once_keep_nobody_out():
    run = Run(2)

    def flood():
        time.sleep(0.1)
        links = [run.connect() for _ in range(300)]
        peer = run.peer(1)
        for link in links:
            link.close()
        return peer

    peers = run.together(lambda: run.peer(0), flood)
    leave(peers)


@pytest.mark.slow
def test_without_file_descriptors_it_waits_until_there_are_some(capsys):
    run = Run(2, timeout=10)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def starve():
        time.sleep(0.2)
        link = socket.socket()
        used = link.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, limits[1]))
        try:
            link.connect(("127.0.0.1", run.port))  # accepting it needs a descriptor more
            time.sleep(0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        link.close()
        return run.peer(1)

    peers = run.together(lambda: run.peer(0), starve)
    leave(peers)
    assert "a connection could not be accepted: Too many open files" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "theirs", "ours"),
    [
        ({"run": "other"}, 'runs another command or version, "other"', 'runs "same"'),
        ({"run": "x" * 9000}, 'runs another command or version, "xxx', 'runs "same"'),
        ({"run": "other", "count": 99}, "is one of 99 processes", "is one of 2"),
        ({"token": "secret"}, "has a token in EASY_JAX_RUN_TOKEN", "has no token"),
    ],
)
def test_a_process_of_another_run_is_told_and_named_at_the_end(other, theirs, ours, capsys):
    run = Run(2, timeout=WAIT)
    told = []

    def wrong():
        time.sleep(0.2)
        start = time.monotonic()
        with pytest.raises(PeersError) as error:
            run.peer(1, **other)
        told.append((str(error.value), time.monotonic() - start))

    error, _ = run.together(lambda: run.peer(0), wrong)
    ((message, seconds),) = told
    assert message.startswith("process 0 refused process 1 (")
    assert f": it {theirs}" in message
    assert '"same"' not in message  # that is the key of who has no token
    assert seconds < 0.8 * WAIT
    assert "process 1 of 2 did not connect within 1.5 s; process 1 (" in str(error)
    assert f"was refused: it {theirs}" in str(error)
    assert f"; process 0 {ours}" in str(error)
    assert "refused process 1 (" in capsys.readouterr().err


@pytest.mark.slow
def test_another_token_is_told():
    run = Run(2, timeout=WAIT)
    errors = run.together(lambda: run.peer(0, token="one"), lambda: run.peer(1, token="two"))
    for error in errors:
        assert "it has another token in EASY_JAX_RUN_TOKEN" in str(error)


@pytest.mark.slow
def test_a_refused_process_may_come_again():
    run = Run(2)

    def wrong_and_right():
        time.sleep(0.2)
        with pytest.raises(PeersError):
            run.peer(1, run="other")
        return run.peer(1)

    leave(run.together(lambda: run.peer(0), wrong_and_right))


@pytest.mark.slow
def test_a_proof_is_for_one_connection(capsys):
    """What a process said to one challenge is no proof for another."""
    run = Run(2, timeout=WAIT)

    def replay():
        time.sleep(0.2)
        with run.connect() as first, run.connect() as second:
            heard = run.hello(first, 1)
            second.recv(10_000)
            second.sendall(heard)
            assert is_dropped(second, seconds=0.5)

    error, _ = run.together(lambda: run.peer(0), replay)
    assert "process 1 of 2 did not connect" in str(error)
    assert "it claims to be process 1 (" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_not_process_0_is_not_believed():
    """A listener at the coordinator's port that says `go` without the key."""
    run = Run(2, timeout=1.0)

    def false_process_0():
        with socket.create_server(("127.0.0.1", run.port)) as server, server.accept()[0] as link:
            link.sendall(b'{"challenge": "x"}\n')
            link.recv(10_000)
            link.sendall(b'{"go": true, "proof": "' + b"0" * 64 + b'"}\n')
            time.sleep(0.2)

    _, error = run.together(false_process_0, lambda: run.peer(1))
    assert "process 1 did not find process 0 at 127.0.0.1:" in str(error)


def test_the_token_of_the_environment(monkeypatch):
    run = Run(2)
    monkeypatch.setenv("EASY_JAX_RUN_TOKEN", " secret\n")
    leave(run.together(lambda: run.peer(0, token=None), lambda: run.peer(1, token="secret")))
