"""Which names a request may be addressed to: the guard against pages that rebind a name of theirs to this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from server.errors import BadRequest

_HOST = re.compile(rb"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_LOOPBACK = (b"localhost", b"127.0.0.1", b"[::1]")


class HostCheck:
    """An allow-list of host names, compared without the port.

    An address the server is bound to by number is never a name an attacker controls, so a server that listens on every
    interface accepts any IP address beside this machine's own name.

    Args:
      allowed: more names; `*` accepts everything.
      bound: the address the server listens on.
    """

    def __init__(self, allowed: Sequence[str], *, bound: str) -> None:
        self._any = "*" in allowed
        self._addresses = bound in ("", "0.0.0.0", "::")
        names = {name.lower().encode() for name in allowed} | set(_LOOPBACK)
        names.add((f"[{bound}]" if ":" in bound else bound).lower().encode())
        if self._addresses:
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
        if name not in self._names and not (self._addresses and _is_address(name)):
            raise BadRequest("Host not allowed; see the setting allowed_hosts", code="host_not_allowed")


def _is_address(name: bytes) -> bool:
    try:
        ipaddress.ip_address(name.strip(b"[]").decode())
    except ValueError:
        return False
    return True
