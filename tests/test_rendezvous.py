"""Who comes to the rendezvous and is not of the run; and where process 0 listens."""

import contextlib
import errno
import json
import resource
import socket
import struct
import threading
import time

import pytest
from processes import has_ipv6
from test_peers import TIMEOUT, Run, leave

from easy_jax.config import ConfigError
from easy_jax.parallel.connection import Connection, printable
from easy_jax.parallel.listening import listen, parse_address
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
    assert "process 1 of 2 did not come within 1.5 s" in str(error)
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
    assert "process 1 of 2 did not come within 1.5 s; process 1 (" in str(error)
    assert f"was refused: it {theirs}" in str(error)
    assert f"; process 0 {ours}" in str(error)
    assert "refused process 1 (" in capsys.readouterr().err


def test_another_token_is_told():
    run = Run(2, timeout=WAIT)
    errors = run.together(lambda: run.peer(0, token="one"), lambda: run.peer(1, token="two"))
    for error in errors:
        assert "it has another token in EASY_JAX_RUN_TOKEN" in str(error)


def test_a_refused_process_may_come_again():
    run = Run(2)

    def wrong_and_right():
        time.sleep(0.2)
        with pytest.raises(PeersError):
            run.peer(1, run="other")
        return run.peer(1)

    leave(run.together(lambda: run.peer(0), wrong_and_right))


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
    assert "process 1 of 2 did not come" in str(error)
    assert "it says process 1 (" in capsys.readouterr().err


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
    assert "process 1 found no process 0 at 127.0.0.1:" in str(error)


def test_the_token_of_the_environment(monkeypatch):
    run = Run(2)
    monkeypatch.setenv("EASY_JAX_RUN_TOKEN", " secret\n")
    leave(run.together(lambda: run.peer(0, token=None), lambda: run.peer(1, token="secret")))


# Where process 0 listens.


def test_ipv6():
    run = Run(2, timeout=WAIT)
    run.address = f"[::1]:{run.port}"
    if has_ipv6():
        peers = run.together(lambda: run.peer(0), lambda: run.peer(1))
        assert peers[0].bind_address == run.address
        leave(peers)
    else:
        start = time.monotonic()
        with pytest.raises(PeersError, match=r"cannot listen on port \d+ of ::1: "):
            run.peer(0)
        assert time.monotonic() - start < 0.5 * WAIT


def resolve(monkeypatch, *hosts):
    """Lets every name lead to these addresses."""
    found = [
        (socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, 6, "", host)
        for host in hosts
    ]
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda _, port, *rest, **__: [
            (*entry, (host, port, 0, 0) if ":" in host else (host, port)) for *entry, host in found
        ],
    )


def names(servers):
    names = sorted(server.getsockname()[0] for server in servers)
    for server in servers:
        server.close()
    return names


def test_a_name_that_leads_to_both_families(monkeypatch):
    resolve(monkeypatch, "::1", "127.0.0.1")
    servers, bind = listen(f"localhost:{Run(1).port}", 1)
    assert names(servers) == (["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"])
    assert bind is not None


def test_it_listens_on_the_interface_of_the_address():
    port = Run(1).port
    servers, bind = listen(f"127.0.0.1:{port}", 1)
    assert names(servers) == ["127.0.0.1"]
    assert bind == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    "address",
    ["192.0.2.1", "127.0.1.1", "127.0.0.1"],  # of nobody; and as Debian has a machine's own name
)
def test_a_name_of_no_interface_means_all_of_them(monkeypatch, capsys, address):
    resolve(monkeypatch, address)
    port = Run(1).port
    servers, bind = listen(f"node7:{port}", 1)
    assert names(servers) in (["::"], ["0.0.0.0"])
    assert bind is None
    said = capsys.readouterr().err
    assert "node7 is not the address of an interface of this machine; process 0 listens" in said
    assert f"on all of them, port {port}" in said


def test_an_unknown_name_means_all_interfaces(monkeypatch, capsys):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    servers, bind = listen(f"service.example:{Run(1).port}", 1)
    assert names(servers) in (["::"], ["0.0.0.0"])
    assert bind is None


def test_where_to_listen_can_be_given(monkeypatch):
    port = Run(1).port
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"127.0.0.1:{port}")
    servers, bind = listen(f"192.0.2.1:{port}", 1)
    assert names(servers) == ["127.0.0.1"]
    assert bind == f"127.0.0.1:{port}"
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"192.0.2.1:{port}")
    with pytest.raises(PeersError, match="mend JAX_COORDINATOR_BIND_ADDRESS"):
        listen(f"127.0.0.1:{port}", 1)


def test_a_machine_without_ipv6_refuses_at_once(monkeypatch):
    create_server = socket.create_server

    def only_ipv4(where, *, family=socket.AF_INET, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported")
        return create_server(where, family=family, **options)

    monkeypatch.setattr(socket, "create_server", only_ipv4)
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    for host in ("::1", "2001:db8::1"):
        with pytest.raises(PeersError, match=rf"cannot listen on port 5000 of {host}: .*;"):
            listen(f"[{host}]:5000", 1)


def test_port_in_use():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            PeersError, match=r"cannot listen on port \d+ of .*in use; .*--coordinator_address"
        ):
            Peers(address, 2, 0, timeout=1.0, run="")


@pytest.mark.parametrize(
    "address",
    [
        "host",
        "host:",
        ":123",
        "host:port",
        "host:99999",
        "host:0",
        "a..b:1",
        "a b:1",
        "[]:1",
        "host:\u0662",
        "\x1b[2J:1",
        f"{'a' * 70}.b:1",
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_bad_address(address, index):
    with pytest.raises(ConfigError, match=r"it must be HOST:PORT") as error:
        Peers(address, 2, index, timeout=1.0, run="")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("address", ["::1:80", "[host]:80", "2001:db8::1:80"])
def test_brackets_are_for_ipv6(address):
    with pytest.raises(ConfigError, match=r"an IPv6 address, and no other, is written in brackets"):
        parse_address(address)


def test_what_others_say_is_escaped_and_cut():
    assert printable("a\x1b[31m\n\u202eb\ud800") == "a\\x1b[31m\\n\\u202eb\\ud800"
    assert printable("\u00e9\u65e5") == "\u00e9\u65e5"
    assert printable("x" * 1000, 10) == "x" * 10 + "..."
    assert printable([[1]]) == "?"
    assert printable(None) == "None"


def test_a_message_may_come_in_pieces_and_must_be_an_object():
    left, right = socket.socketpair()
    with left, right:
        connection = Connection(left)
        for piece in (b'{"a"', b": 1}\n{", b'"b": 2}\n'):
            right.sendall(piece)
            connection.read()
        assert list(connection.messages()) == [{"a": 1}, {"b": 2}]
        right.sendall(b"[")
        connection.read()
        with pytest.raises(EOFError, match="no JSON object"):
            list(connection.messages())
