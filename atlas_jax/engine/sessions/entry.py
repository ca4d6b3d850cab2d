"""A session as an engine knows it: where it is, how much of it is stored, and who is using it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from atlas_jax.engine.api import SessionKey
from atlas_jax.engine.sessions.journal import Reading
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.snapshot import Listing
from atlas_jax.engine.sessions.store import StoredSession

Tier = Literal["device", "host", "disk"]


@dataclass(eq=False)
class Entry:
    """A session as the index knows it.

    Attributes:
      listing: what can be said without the session itself.
      session: the session itself, or None while it is on disk only.
      tier: where its state is.
      stored: it in the store, or None before anything has been written.
      vacant: its place in a shared store, where nothing is as far as is known.
      checked: `time.monotonic()` before a shared store was last asked whether this is the newest there is.
      written: the generation that the store holds, snapshot and journal together.
      busy: a request is using it, or a thread is reading or writing it.
      error: why it could not be read the last time, until that has been reported.
      problem: why it cannot be used at all.
      resting, charged: bytes counted for its tier, and for its owner's share of the disk.
    """

    key: SessionKey
    listing: Listing
    session: Session | None = None
    tier: Tier = "host"
    stored: StoredSession | None = None
    vacant: StoredSession | None = None
    checked: float = -inf
    written: int = 0
    busy: bool = False
    error: str | None = None
    problem: str | None = None
    resting: tuple[Tier, int] = ("host", 0)
    charged: int = 0

    @property
    def exists(self) -> bool:
        """Whether there is anything of it yet; the place held for a session that does not exist has nothing."""
        return self.session is not None or self.stored is not None

    @property
    def is_clean(self) -> bool:
        """Whether its newest snapshot holds all of it."""
        generation = self.listing.generation if self.session is None else self.session.generation
        return self.stored is not None and self.stored.generation >= generation

    @property
    def stored_bytes(self) -> int:
        """Bytes it takes of the store."""
        return 0 if self.stored is None else self.stored.size


@dataclass(frozen=True)
class SessionLease:
    """One request's hold on a session; `session` is None for one that does not exist yet."""

    key: SessionKey
    entry: Entry
    session: Session | None


@dataclass(frozen=True)
class NewText:
    """What a turn did to its session's text.

    Attributes:
      keep: how many tokens of the text before it stay.
      tokens: what follows them.
      whole: the whole text from its beginning, where the request brought it; else None.
    """

    keep: int
    tokens: Sequence[int]
    whole: Callable[[], Sequence[int]] | None
    reading: Reading


def new_listing(key: SessionKey, now: float) -> Listing:
    """Of a session that has read nothing."""
    return Listing(
        owner=key.owner,
        session_id=key.session_id,
        generation=0,
        tokens=0,
        floor=0,
        bytes=0,
        created=now,
        last_used=now,
        has_state=False,
    )
