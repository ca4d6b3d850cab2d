"""Messages between two processes of an engine: length and bytes over TCP."""

from __future__ import annotations

import contextlib
import socket
import struct

_LENGTH = struct.Struct(">Q")
_JOINED = 1 << 16
"""Bytes up to which a message is copied behind its length, so that it goes out in one packet."""
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 10, 5, 3
"""A machine that is gone says nothing; without an answer to these probes its connection ends after 25 seconds."""


class Connection:
    """One connection; one thread may send while another receives."""

    def __init__(self, one: socket.socket) -> None:
        self._socket = one
        one.settimeout(None)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _IDLE_SECONDS),
            ("TCP_KEEPINTVL", _PROBE_SECONDS),
            ("TCP_KEEPCNT", _PROBES),
            ("TCP_USER_TIMEOUT", 1000 * (_IDLE_SECONDS + _PROBES * _PROBE_SECONDS)),
        ):
            if hasattr(socket, name):  # not on every system
                one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, data: bytes) -> None:
        """Sends a message; raises OSError if the other end is gone."""
        head = _LENGTH.pack(len(data))
        if len(data) <= _JOINED:
            self._socket.sendall(head + data)
        else:
            self._socket.sendall(head)
            self._socket.sendall(data)

    def receive(self) -> bytes | None:
        """The next message; None if the other end is gone."""
        try:
            head = self._read(_LENGTH.size)
            return None if head is None else self._read(_LENGTH.unpack(head)[0])
        except OSError:
            return None

    def close(self) -> None:
        """Ends it; who waits in `receive`, at either end, is told so."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes | None:
        data = bytearray(size)
        view, read = memoryview(data), 0
        while read < size:
            count = self._socket.recv_into(view[read:])
            if not count:
                return None
            read += count
        return bytes(data)
