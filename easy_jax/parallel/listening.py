"""Where process 0 listens: the coordinator's address, and the interfaces that it leads to."""

import errno
import ipaddress
import os
import socket

from easy_jax.io.checks import ConfigError
from easy_jax.parallel.connection import printable, say

_BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's own
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENODEV)


class PeersError(RuntimeError):
    """The processes of a run did not come together; the message names those missing."""


def parse_address(address: str) -> tuple[str, int]:
    """Splits `HOST:PORT`, where HOST is a name, an IPv4 address or an IPv6 address in brackets.

    Raises:
      ConfigError: it is none of these.

    Example:
      >>> parse_address("[::1]:8476")
      ('::1', 8476)
    """
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 1 << 16
    in_brackets = host.startswith("[") and host.endswith("]")
    name = host[1:-1] if in_brackets else host
    shown = printable(address)
    if not (is_port and _is_host(name)):
        raise ConfigError(f"the coordinator's address is {shown!r}; it must be HOST:PORT")
    if in_brackets != (":" in name):
        raise ConfigError(
            f"the coordinator's address is {shown!r}; an IPv6 address, and no other, is written in "
            "brackets: [ADDRESS]:PORT"
        )
    return name, int(port)


def listen(address: str, backlog: int) -> tuple[list[socket.socket], str | None]:
    """Listens on the interfaces that an address of this machine leads to.

    Where the address is not one of theirs, as behind NAT or a Kubernetes service, it listens on
    all of them, and says so. It does so, too, where a name other than `localhost` leads to the
    loopback: Debian's /etc/hosts has that for a machine's own name, which others find elsewhere.
    The variable `JAX_COORDINATOR_BIND_ADDRESS` overrides the choice, as it does in JAX.

    Args:
      address: `HOST:PORT`.
      backlog: how many connections may wait to be accepted.

    Returns:
      The listening sockets, and where JAX's service is to listen later; None: on all interfaces.

    Raises:
      ConfigError: the address is malformed.
      PeersError: the port is in use, or this machine cannot have the address.
    """
    host, port = parse_address(address)
    if bind := os.environ.get(_BIND_VARIABLE):
        host, port = parse_address(bind)
    literal = _literal(host)
    try:
        servers = _listen_on(_addresses(host, port, literal), backlog)
        if servers:
            alone = literal is None and len(servers) == 1
            return servers, bind or (_name_of(servers[0]) if alone else address)
        if bind or (literal is not None and literal.is_loopback):
            raise OSError(errno.EADDRNOTAVAIL, "this machine has no such address")
        servers = [_listen_everywhere(port, backlog, literal)]
    except OSError as error:
        advice = "choose another in --coordinator_address"
        if error.errno == errno.EADDRINUSE:
            advice = "does another run use it? Choose another port in --coordinator_address"
        elif bind:
            advice = f"mend {_BIND_VARIABLE}"
        raise PeersError(
            f"process 0 cannot listen on port {port} of {printable(host)}: "
            f"{os.strerror(error.errno) if error.errno else error}; {advice}"
        ) from error
    say(
        f"{printable(host)} is not the address of an interface of this machine; process 0 listens "
        f"on all of them, port {port}"
    )
    return servers, None


def _is_host(name: str) -> bool:
    try:
        return bool(name.encode("idna")) and name.isprintable() and not set(" []") & set(name)
    except UnicodeError:  # a label that is empty or too long, say
        return False


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _addresses(
    host: str, port: int, literal: ipaddress.IPv4Address | ipaddress.IPv6Address | None
) -> list[tuple[socket.AddressFamily, tuple]]:
    """What the host leads to, by family; nothing if it is not known here."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    addresses = dict.fromkeys((family, where) for family, *_, where in found)
    if literal is not None or host == "localhost" or host.endswith(".localhost"):
        return list(addresses)
    return [
        (family, where)
        for family, where in addresses
        if not ipaddress.ip_address(where[0]).is_loopback
    ]


def _listen_on(
    addresses: list[tuple[socket.AddressFamily, tuple]], backlog: int
) -> list[socket.socket]:
    servers: list[socket.socket] = []
    for family, where in addresses:
        try:
            servers.append(socket.create_server(where, family=family, backlog=backlog))
        except OSError as error:
            if error.errno in _NOT_HERE:
                continue
            for server in servers:
                server.close()
            raise
    return servers


def _listen_everywhere(
    port: int, backlog: int, literal: ipaddress.IPv4Address | ipaddress.IPv6Address | None
) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    if literal is not None and literal.version == 6 and not both:
        raise OSError(errno.EAFNOSUPPORT, "no IPv6")
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)


def _name_of(server: socket.socket) -> str:
    return host_and_port(server.getsockname())


def host_and_port(where: tuple) -> str:
    """An address of a socket as text.

    Example:
      >>> host_and_port(("::1", 8476, 0, 0))
      '[::1]:8476'
    """
    host, port = where[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
