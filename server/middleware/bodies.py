"""Request bodies: read as JSON where that holds nobody up, and refused by what they hold before it is built.

A body of four megabytes can be a million empty lists: half a second to build and seconds to collect, in which the
interpreter does nothing else, whichever thread it is in. Counting is a few passes over bytes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from server.errors import TooLarge
from server.services.thread_pools import ThreadPools

# Reading this much takes less than half a millisecond; more goes to a thread.
_INLINE_BYTES = 16 << 10
# Of a body of the largest size: so many bytes for every value, and for every one that is not a number.
_VALUE_BYTES, _OBJECT_BYTES = 4, 32


class Bodies:
    """Decodes bodies, within limits that follow from the largest size of one."""

    def __init__(self, pools: ThreadPools, *, max_bytes: int) -> None:
        self._pools = pools
        self._values, self._objects = max_bytes // _VALUE_BYTES, max_bytes // _OBJECT_BYTES

    async def decode(self, body: bytes) -> Any:
        """The JSON value, None for an empty body; raises TooLarge, or what msgspec raises."""
        if len(body) <= _INLINE_BYTES:
            return self._decode(body)
        return await self._pools.run("bodies", lambda: self._decode(body))

    def _decode(self, body: bytes) -> Any:
        if not body:
            return None
        self._check(body)
        return msgspec.json.decode(body)

    def _check(self, body: bytes) -> None:
        """Raises TooLarge over a limit; what is not valid JSON is left to the decoder, which stops where it errs."""
        if len(body) <= self._objects:
            return
        if b"\\" in body:
            # From the left, so that an escaped backslash does not escape what follows it.
            body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
        strings = body.count(b'"') // 2
        if strings <= self._objects:
            body = b"".join(body.split(b'"')[::2])  # what is outside of strings
            objects = strings + body.count(b"[") + body.count(b"{")
            if objects <= self._objects and objects + body.count(b",") <= self._values:
                return
        raise TooLarge(
            f"The request body holds too much: at most {self._objects} strings, arrays and objects, and {self._values} "
            "values"
        )
