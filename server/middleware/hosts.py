"""Which names a request may be addressed to: the guard against pages that rebind a name of theirs to this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from server.errors import BadRequest

_HOST = re.compile(rb"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_LOOPBACK = (b"localhost", b"127.0.0.1", b"[::1]")
_CONTAINER_HOST = b"host.docker.internal"
# Reserved for private use, so that no public name server ever answers for them: RFC 6762, ICANN 2024, RFC 8375.
_PRIVATE_SUFFIXES = (b".local", b".internal", b".home.arpa")


class HostCheck:
    """An allow-list of host names, compared without the port.

    A page rebinds a name that its author controls, so names nobody can register in the public DNS are safe from it: those
    of one label, as services have in a Docker network or a Kubernetes namespace, and those under suffixes reserved for
    private use. Whoever runs the local network's DNS does control them, but can reach a server that listens on that
    network anyway. So such a server accepts them. One on the loopback, which that network must not reach, accepts
    `localhost`, what is under it, and the name by which Docker's containers call the machine they run on.

    An address is no name: a server that listens on every interface accepts any.

    Args:
      allowed: more names; `*` accepts everything.
      bound: the address the server listens on.
    """

    def __init__(self, allowed: Sequence[str], *, bound: str) -> None:
        self._any = "*" in allowed
        self._addresses = bound in ("", "0.0.0.0", "::")
        self._private = not _is_loopback(bound)
        names = {name.lower().encode() for name in allowed} | {*_LOOPBACK, _CONTAINER_HOST}
        names.add((f"[{bound}]" if ":" in bound else bound).lower().encode())
        if self._private:
            names.add(socket.gethostname().lower().encode())
        self._names = names

    def check(self, given: Sequence[bytes]) -> None:
        """Raises BadRequest unless there is exactly one Host header, and it is on the list.

        Without one (HTTP/1.0) it was no browser that sent the request.
        """
        if self._any or not given:
            return
        match = _HOST.fullmatch(given[0].lower()) if len(given) == 1 else None
        if match is None or (match["port"] and int(match["port"]) > 65_535):
            raise BadRequest("Invalid Host header", code="host_not_allowed")
        name = match["name"]
        if name not in self._names and not self._safe(name):
            raise BadRequest("Host not allowed; see the setting allowed_hosts", code="host_not_allowed")

    def _safe(self, name: bytes) -> bool:
        if _address(name) is not None:
            return self._addresses
        name = name.removesuffix(b".")
        return _under(name, b".localhost") or (
            self._private and (_one_label(name) or any(_under(name, suffix) for suffix in _PRIVATE_SUFFIXES))
        )


def _one_label(name: bytes) -> bool:
    """Whether a name has no dot. One that begins like a number is a way to write an address, which browsers rewrite."""
    return b"." not in name and name[:1].isalpha()


def _under(name: bytes, suffix: bytes) -> bool:
    return name.endswith(suffix) and not name.startswith(b".") and b".." not in name


def _address(name: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip(b"[]").decode())
    except ValueError:
        return None


def _is_loopback(bound: str) -> bool:
    address = _address(bound.encode())
    return bound.lower() == "localhost" if address is None else address.is_loopback
