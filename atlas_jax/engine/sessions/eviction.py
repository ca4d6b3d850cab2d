"""Which session leaves a full tier first: least recently used, least frequently used, or adaptive (ARC)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from atlas_jax.engine.api import CacheStrategy, SessionKey


class Eviction:
    """Follows every use of the keys of one tier and names the next to leave, by whichever strategy is asked for.

    ARC (Megiddo and Modha, 2003) keeps keys used once (recent) apart from keys used again (frequent), and remembers the
    keys it evicted from each: a key that comes back to early shifts room to the side it was evicted from.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[SessionKey, None] = OrderedDict()
        self._frequent: OrderedDict[SessionKey, None] = OrderedDict()
        self._ghost_recent: OrderedDict[SessionKey, None] = OrderedDict()
        self._ghost_frequent: OrderedDict[SessionKey, None] = OrderedDict()
        self._uses: dict[SessionKey, int] = {}
        self._order: OrderedDict[SessionKey, None] = OrderedDict()
        self._target = 0.0  # of the recent side, in keys

    def use(self, key: SessionKey) -> None:
        """Records that a key entered the tier or was used in it."""
        self._order[key] = None
        self._order.move_to_end(key)
        self._uses[key] = self._uses.get(key, 0) + 1
        if key in self._recent or key in self._frequent:
            self._recent.pop(key, None)
            self._frequent.pop(key, None)
            self._frequent[key] = None
            return
        size = max(1, len(self._order))
        if key in self._ghost_recent:
            shift = max(1.0, len(self._ghost_frequent) / len(self._ghost_recent))
            self._target = min(size, self._target + shift)
            del self._ghost_recent[key]
            self._frequent[key] = None
        elif key in self._ghost_frequent:
            shift = max(1.0, len(self._ghost_recent) / len(self._ghost_frequent))
            self._target = max(0.0, self._target - shift)
            del self._ghost_frequent[key]
            self._frequent[key] = None
        else:
            self._recent[key] = None

    def victim(self, strategy: CacheStrategy, may_leave: Callable[[SessionKey], bool]) -> SessionKey | None:
        """The key that should leave first among those that may, or None."""
        if strategy == "lru":
            return next((key for key in self._order if may_leave(key)), None)
        if strategy == "lfu":
            candidates = [key for key in self._order if may_leave(key)]
            return min(candidates, key=self._uses.__getitem__, default=None)  # the first of equals is the oldest
        sides = [self._recent, self._frequent]
        if len(self._recent) <= self._target:
            sides.reverse()
        return next((key for side in sides for key in side if may_leave(key)), None)

    def evicted(self, key: SessionKey) -> None:
        """Records that a key left to make room."""
        ghosts = self._ghost_recent if key in self._recent else self._ghost_frequent
        self._drop(key)
        ghosts[key] = None
        while len(ghosts) > max(16, len(self._order)):
            self._uses.pop(ghosts.popitem(last=False)[0], None)

    def forget(self, key: SessionKey) -> None:
        """Records that a key is gone for good."""
        self._drop(key)
        self._ghost_recent.pop(key, None)
        self._ghost_frequent.pop(key, None)
        self._uses.pop(key, None)

    def _drop(self, key: SessionKey) -> None:
        self._order.pop(key, None)
        self._recent.pop(key, None)
        self._frequent.pop(key, None)
