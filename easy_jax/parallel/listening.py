"""The choice of network interfaces on which process 0 listens, by the coordinator's address."""

import errno
import ipaddress
import os
import socket

from easy_jax.io.checks import ConfigError
from easy_jax.parallel.connection import printable, say

_BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX reads it, too
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENODEV)


class PeersError(RuntimeError):
    """The processes of a run could not connect to each other; the message names those missing."""


def parse_address(address: str) -> tuple[str, int]:
    """Splits `HOST:PORT`, where HOST is a name, an IPv4 address or an IPv6 address in brackets.

    Raises:
      ConfigError: the address has another form.

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
            f"the coordinator's address is {shown!r}; write an IPv6 address, and only that, in "
            "brackets: [ADDRESS]:PORT"
        )
    return name, int(port)


def listen(address: str, backlog: int) -> tuple[list[socket.socket], str | None]:
    """Listens on the network interfaces of this machine that have the given address.

    If no interface has the address, as behind NAT or a Kubernetes service, the function listens on
    all interfaces and prints a message. It does the same if a name other than `localhost` resolves
    to a loopback address only: Debian's /etc/hosts does so for the machine's own name, which other
    machines resolve to another address. The environment variable `JAX_COORDINATOR_BIND_ADDRESS`
    overrides the choice, as it does in JAX.

    Args:
      address: `HOST:PORT` of the coordinator.
      backlog: how many connections may wait to be accepted.

    Returns:
      The listening sockets, and the address on which JAX's coordination service should listen
      later; None means all interfaces.

    Raises:
      ConfigError: the address is malformed.
      PeersError: the port is in use, or the address can never belong to this machine.
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
            advice = f"correct {_BIND_VARIABLE}"
        raise PeersError(
            f"process 0 cannot listen on port {port} of {printable(host)}: "
            f"{os.strerror(error.errno) if error.errno else error}; {advice}"
        ) from error
    say(
        f"no network interface of this machine has the address {printable(host)}; process 0 "
        f"listens on all interfaces, port {port}"
    )
    return servers, None


def _is_host(name: str) -> bool:
    try:
        return bool(name.encode("idna")) and name.isprintable() and not set(" []") & set(name)
    except UnicodeError:  # for example, a label is empty or too long
        return False


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _addresses(
    host: str, port: int, literal: ipaddress.IPv4Address | ipaddress.IPv6Address | None
) -> list[tuple[socket.AddressFamily, tuple]]:
    """Resolves a host to (family, socket address) pairs; empty if it cannot be resolved.

    Loopback addresses are left out unless the host is an IP address or `localhost`.
    """
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
    """Formats a socket address as `HOST:PORT`.

    Example:
      >>> host_and_port(("::1", 8476, 0, 0))
      '[::1]:8476'
    """
    host, port = where[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
