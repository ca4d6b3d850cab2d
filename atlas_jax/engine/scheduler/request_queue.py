"""Waiting requests, served in turn: owners take turns, and each owner's requests keep their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served within an owner; round-robin between owners."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for items in self._owners.values())

    def __iter__(self) -> Iterator[T]:
        for items in self._owners.values():
            yield from items

    def push(self, owner: str, item: T) -> None:
        """Adds an item at the end of its owner's line."""
        self._owners.setdefault(owner, deque()).append(item)

    def take(self, ready: Callable[[T], bool]) -> T | None:
        """Removes and returns the next item that is ready, or None. Its owner goes to the back of the round.

        An item that is not ready (its session is in use, say) does not hold up those behind it.
        """
        for owner, items in self._owners.items():
            for index, item in enumerate(items):
                if ready(item):
                    del items[index]
                    self._owners.move_to_end(owner)
                    if not items:
                        del self._owners[owner]
                    return item
        return None

    def remove(self, item: T) -> bool:
        """Removes an item if it is there; tells whether it was."""
        for owner, items in self._owners.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._owners[owner]
                return True
        return False
