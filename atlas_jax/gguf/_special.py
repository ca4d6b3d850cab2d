"""Cutting special tokens out of a text before the rest is tokenised."""

from __future__ import annotations

import bisect
import heapq
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, takewhile

from atlas_jax.gguf._header import GGUFError

# White space of C's isspace, which is what tokens that swallow it are defined by.
_BLANKS = " \t\n\v\f\r"
# Tokens that begin with one another nest groups of the pattern; vocabularies have runs of up to 31 line feeds.
_MAX_NESTING = 100


def _pattern(texts: list[str], level: int = 0) -> str:
    """A pattern for the longest of the sorted texts at a position, which looks at each character once."""
    if level > _MAX_NESTING:
        raise GGUFError(f"more than {_MAX_NESTING} special tokens begin with one another")
    first, last = texts[0], texts[-1]
    # Of sorted texts, the first and the last share the prefix that all share.
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))))
    ends = len(first) == shared
    rest = [text[shared:] for text in texts[ends:]]
    if not rest:
        return re.escape(first)
    branches = [_pattern(list(group), level + 1) for _, group in groupby(rest, key=lambda text: text[0])]
    return f"{re.escape(first[:shared])}(?:{'|'.join(branches)}){'?' if ends else ''}"


class SpecialSplitter:
    """Finds tokens by their text: longer ones first, each from left to right, never inside one already found.

    This is llama.cpp's order. It differs from the longest match at each position where tokens overlap.
    """

    __slots__ = ("_clear", "_order", "_pattern", "_ranks", "_rstrip_ids", "_sorted")

    def __init__(self, tokens: Mapping[str, int], rstrip_ids: frozenset[int] = frozenset()) -> None:
        """Compiles the search.

        Args:
          tokens: text → id.
          rstrip_ids: tokens that swallow the white space after them.

        Raises:
          GGUFError: too many tokens begin with one another.
        """
        self._order = sorted(tokens.items(), key=lambda item: (-len(item[0].encode()), item[1]))
        self._ranks = {text: rank for rank, (text, _) in enumerate(self._order)}
        self._rstrip_ids = rstrip_ids
        self._sorted = sorted(tokens)
        self._pattern = re.compile(_pattern(self._sorted)) if tokens else None
        self._clear: dict[str, bool] = {}

    def split(self, text: str) -> list[str | int]:
        """The text as a list of ids of special tokens and the non-empty texts between them."""
        parts: list[str | int] = []
        begin = 0
        for start, end, token in self._find(text):
            if start > begin:
                parts.append(text[begin:start])
            parts.append(token)
            begin = end
        if begin < len(text):
            parts.append(text[begin:])
        return parts

    def split_all(self, parts: Iterable[str | int]) -> list[str | int]:
        """Splits the texts among `parts`; a text after a token that swallows white space loses its own first."""
        result: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                result.append(part)
            elif result and result[-1] in self._rstrip_ids:
                result += self.split(part.lstrip(_BLANKS))
            else:
                result += self.split(part)
        return result

    def _is_clear(self, special: str) -> bool:
        """Whether no token that goes before this one can begin inside it."""
        clear = self._clear.get(special)
        if clear is None:
            rank = self._ranks[special]
            clear = self._clear[special] = not any(
                self._ranks[other] < rank
                for start in range(1, len(special))
                for other in self._beginning_with(special[start:])
            )
        return clear

    def _beginning_with(self, prefix: str) -> Iterator[str]:
        at = bisect.bisect_left(self._sorted, prefix)
        return takewhile(lambda text: text.startswith(prefix), itertools.islice(self._sorted, at, None))

    def _starts(self, text: str) -> defaultdict[int, list[int]]:
        """Where tokens begin, by the rank of the longest that does."""
        starts: defaultdict[int, list[int]] = defaultdict(list)
        match = self._pattern.search(text) if self._pattern else None
        reach = 0
        while match and self._pattern:
            special, start, end = match[0], match.start(), match.end()
            starts[self._ranks[special]].append(start)
            # A token that nothing overlaps is found for certain; a run of line feeds is not looked at one by one.
            certain = start >= reach and self._is_clear(special)
            reach = max(reach, end)
            match = self._pattern.search(text, end if certain else start + 1)
        return starts

    def _find(self, text: str) -> list[tuple[int, int, int]]:
        """Start, end and id of the tokens in the text, in its order."""
        starts = self._starts(text)
        if not starts:
            return []
        taken = bytearray(len(text))
        found: list[tuple[int, int, int]] = []
        ranks = list(starts)
        heapq.heapify(ranks)
        while ranks:
            rank = heapq.heappop(ranks)
            special, token = self._order[rank]
            for start in sorted(starts.pop(rank)):
                if taken[start]:
                    continue
                end = start + len(special)
                if taken.find(1, start, end) >= 0:
                    shorter = next(
                        (r for n in range(len(special) - 1, 0, -1) if (r := self._ranks.get(special[:n]))), None
                    )
                    if shorter is not None:
                        if shorter not in starts:
                            heapq.heappush(ranks, shorter)
                        starts[shorter].append(start)
                    continue
                if token in self._rstrip_ids:
                    while end < len(text) and text[end] in _BLANKS and not taken[end]:
                        end += 1
                taken[start:end] = b"\1" * (end - start)
                found.append((start, end, token))
        return sorted(found)
