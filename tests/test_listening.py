"""Where process 0 of a run listens, and the addresses it accepts."""

import errno
import socket
import time

import pytest
from peer_threads import Run, leave
from processes import has_ipv6

from easy_jax.config import ConfigError
from easy_jax.parallel.connection import Connection, printable
from easy_jax.parallel.listening import listen, parse_address
from easy_jax.parallel.rendezvous import PeersError
from easy_jax.parallel.watch import Peers

WAIT = 1.5  # seconds


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
    assert "no network interface of this machine has the address node7; process 0 listens" in said
    assert f"on all interfaces, port {port}" in said


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
    with pytest.raises(PeersError, match="correct JAX_COORDINATOR_BIND_ADDRESS"):
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
    with pytest.raises(ConfigError, match=r"write an IPv6 address, and only that, in brackets"):
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
        with pytest.raises(EOFError, match="not a JSON object"):
            list(connection.messages())
