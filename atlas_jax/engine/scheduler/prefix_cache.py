"""KV caches of prompts, so that the next one with the same prefix does not prefill that again.

Whole pages only: a page that was prefilled as one chunk holds the same numbers whoever does it, so an answer after a reused
page is the answer after a fresh one, bit for bit. Only plain requests take part (sessions keep their own state), and only
those of one owner share.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.sessions.host_arrays import held_bytes
from atlas_jax.engine.sessions.lora import LoraScales


@dataclass(frozen=True)
class _Entry:
    """A prompt's state and the names of its pages."""

    row: Sequences
    names: tuple[bytes, ...]
    size: int


class PrefixCache:
    """States of prompts by owner and text, least recently used first out; for one thread.

    A page's name is a digest of the owner, the LoRA adapters in use and all tokens up to its end, so the longest known name
    is the longest common prefix: a radix tree over pages without the tree.

    Attributes:
      budget: bytes of states that are kept; 0 keeps none.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._size = 0
        self._number = itertools.count()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._holders: dict[bytes, set[int]] = {}

    @property
    def size(self) -> int:
        """Bytes of states that are kept."""
        return self._size

    def find(self, owner: str, tokens: Sequence[int], lora: LoraScales = ()) -> tuple[Sequences, int] | None:
        """The state that has read most of the first `tokens`, and how many of them: whole pages. It is not to be donated."""
        if not self._entries:
            return None
        names = list(_names(owner, tokens, lora))
        for count in range(len(names), 0, -1):
            holders = self._holders.get(names[count - 1])
            if holders:
                number = max(holders)
                self._entries.move_to_end(number)
                return self._entries[number].row, count * PAGE
        return None

    def keep(self, owner: str, tokens: Sequence[int], row: Sequences, lora: LoraScales = ()) -> None:
        """Keeps a row as `ModelRunner.prefix_row` makes it, which has read `tokens` as one prompt."""
        names = tuple(_names(owner, tokens, lora))
        size = held_bytes(row)
        if not names or size > self.budget or names[-1] in self._holders:
            return
        for name in names[:-1]:  # a prompt that this one begins with is no longer needed
            for number in list(self._holders.get(name, ())):
                if self._entries[number].names[-1] == name:
                    self._drop(number)
        while self._size + size > self.budget:
            self._drop(next(iter(self._entries)))
        number = next(self._number)
        self._entries[number] = _Entry(row, names, size)
        self._size += size
        for name in names:
            self._holders.setdefault(name, set()).add(number)

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number)
        self._size -= entry.size
        for name in entry.names:
            holders = self._holders[name]
            holders.remove(number)
            if not holders:
                del self._holders[name]


def _names(owner: str, tokens: Sequence[int], lora: LoraScales) -> Iterator[bytes]:
    name = hashlib.blake2b(msgspec.json.encode((owner, lora)), digest_size=16).digest()
    text = np.asarray(tokens[: len(tokens) // PAGE * PAGE], np.int32).reshape(-1, PAGE)
    for page in text:
        name = hashlib.blake2b(name + page.tobytes(), digest_size=16).digest()
        yield name
