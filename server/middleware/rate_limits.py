"""Rates: token buckets per API key, and a budget of failures per address before any key is known."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from server.errors import TooManyRequests

Clock = Callable[[], float]
_MINUTE = 60.0


class TokenBucket:
    """Holds up to `burst` tokens and gains `rate` of them a second; may go into debt, never above `burst`."""

    __slots__ = ("_clock", "_level", "_updated", "burst", "rate")

    def __init__(self, rate: float, burst: float, clock: Clock = time.monotonic) -> None:
        self.rate, self.burst, self._clock = rate, burst, clock
        self._level, self._updated = burst, clock()

    @property
    def level(self) -> float:
        """Tokens there now."""
        now = self._clock()
        self._level = min(self.burst, self._level + max(0.0, now - self._updated) * self.rate)
        self._updated = now
        return self._level

    def take(self, amount: float) -> bool:
        """Takes `amount` if it is there; a request larger than the whole bucket passes when the bucket is full."""
        if self.level < min(amount, self.burst):
            return False
        self._level -= amount
        return True

    def give(self, amount: float) -> None:
        """Returns (or, negative, takes) what an estimate got wrong."""
        self._level = min(self.burst, self.level + amount)

    def wait(self, amount: float) -> float:
        """Seconds until `take(amount)` can succeed."""
        return max(0.0, (min(amount, self.burst) - self.level) / self.rate)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a response tells a client about one of its limits."""

    limit: int
    remaining: int
    reset_seconds: float


class KeyLimits:
    """Requests and tokens a minute for every key; 0 means no limit.

    There are as many buckets as keys in the keys file, so none is ever evicted and refilled that way.
    """

    def __init__(self, requests: int, tokens: int, clock: Clock = time.monotonic) -> None:
        self._limits = {"requests": requests, "tokens": tokens}
        self._clock = clock
        self._buckets: dict[tuple[str, str], TokenBucket] = {}

    def _bucket(self, kind: str, key_id: str) -> TokenBucket | None:
        limit = self._limits[kind]
        if limit <= 0:
            return None
        bucket = self._buckets.get((kind, key_id))
        if bucket is None:
            bucket = self._buckets[kind, key_id] = TokenBucket(limit / _MINUTE, limit, self._clock)
        return bucket

    def request(self, key_id: str) -> None:
        """Counts one request; raises TooManyRequests."""
        self._take("requests", key_id, 1)

    def reserve(self, key_id: str, tokens: int) -> None:
        """Takes an estimate of the tokens a request will use; raises TooManyRequests."""
        self._take("tokens", key_id, tokens)

    def settle(self, key_id: str, reserved: int, used: int) -> None:
        """Corrects an estimate once the truth is known."""
        if bucket := self._bucket("tokens", key_id):
            bucket.give(reserved - used)

    def _take(self, kind: str, key_id: str, amount: float) -> None:
        bucket = self._bucket(kind, key_id)
        if bucket is not None and not bucket.take(amount):
            raise TooManyRequests(
                f"Rate limit reached: {self._limits[kind]} {kind} per minute", retry_after=bucket.wait(amount)
            )

    def quota(self, key_id: str) -> dict[str, Quota]:
        """The limits that apply to a key, by kind."""
        out: dict[str, Quota] = {}
        for kind, limit in self._limits.items():
            if bucket := self._bucket(kind, key_id):
                level = bucket.level
                out[kind] = Quota(limit, max(0, int(level)), max(0.0, (bucket.burst - level) / bucket.rate))
        return out


class FailureBudget:
    """How many requests without a valid key an address may send a minute before they are refused as too many; 0 means
    no limit.

    A valid key is never refused here: behind a proxy or a NAT one address is many people. An address is an IPv4 address
    or an IPv6 /64. The table is bounded: a bucket leaves it when it is full again, which forgets nothing; while none is
    full, newcomers share one bucket.
    """

    def __init__(self, per_minute: int, *, addresses: int = 4096, clock: Clock = time.monotonic) -> None:
        self._per_minute, self._addresses, self._clock = per_minute, addresses, clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._shared = self._new()

    def _new(self) -> TokenBucket:
        return TokenBucket(max(1, self._per_minute) / _MINUTE, max(1, self._per_minute), self._clock)

    def failed(self, peer: str) -> None:
        """Counts one refused request; raises TooManyRequests once the address has used up its budget."""
        if self._per_minute <= 0:
            return
        bucket = self._bucket(network(peer))
        if not bucket.take(1):
            raise TooManyRequests("Too many requests without a valid key", retry_after=bucket.wait(1))

    def _bucket(self, name: str) -> TokenBucket:
        if name in self._buckets:
            return self._buckets[name]
        self._forget_full()
        if len(self._buckets) >= self._addresses:
            return self._shared
        bucket = self._buckets[name] = self._new()
        return bucket

    def _forget_full(self) -> None:
        """Drops the oldest buckets that are full, a few at a time so that no request pays for all."""
        for name in list(islice(self._buckets, 8)) if len(self._buckets) >= self._addresses else ():
            if self._buckets[name].level >= self._buckets[name].burst:
                del self._buckets[name]
            else:
                self._buckets.move_to_end(name)


def network(peer: str) -> str:
    """What counts as one address: an IPv4 address or an IPv6 /64."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return peer
