"""SentencePiece BPE: the two neighbours that make the token of the best score merge, leftmost first, until none do.

llama.cpp merges any two neighbours whose joined text is a token. Rank-ordered BPE (`_bpe`) does the same if every way
to cut a token in two is a rule, ordered by the token's score, and no two tokens share a score. For, inside the span
that becomes a token, merges happen in the order in which they would happen to the token alone (a merge across the
span's border would prevent the token); so only one of a token's cuts can ever occur, whatever stands around it, and the
order of its rules among themselves does not matter. Vocabularies with equal scores take the heap below.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from gguf.constants import TokenType

from atlas_jax.gguf._bpe import BytePairMerger
from atlas_jax.gguf._vocab import Vocabulary

SPACE = "▁"

_NEVER_MERGED = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)


class Merger(Protocol):
    """Merges the characters of words into tokens."""

    def merge(self, words: Sequence[str]) -> dict[str, list[int]]: ...


class ScoreMerger:
    """Merges by score with a heap, in O(n log n) for a word of n characters."""

    def __init__(self, scores: Mapping[str, float], ids: Mapping[str, int], unknown: Sequence[int]) -> None:
        """Takes the vocabulary.

        Args:
          scores: of every text that a merge may make.
          ids: of every token that may come out, `<0xXX>` for bytes among them.
          unknown: what stands for a character without tokens for its bytes.
        """
        self._scores = scores
        self._ids = ids
        self._unknown = unknown
        self._longest = max(map(len, scores), default=0)

    def merge(self, words: Sequence[str]) -> dict[str, list[int]]:
        """Ids of each of some words."""
        return {word: self._merge_word(word) for word in words}

    def _merge_word(self, word: str) -> list[int]:
        size, scores, longest = len(word), self._scores, self._longest
        # A symbol is known by where it starts; `end` is 0 once it has become part of the symbol before it.
        end = list(range(1, size + 1))
        before = list(range(-1, size - 1))
        heap = [
            (-score, start, start + 2)
            for start in range(size - 1)
            if (score := scores.get(word[start : start + 2])) is not None
        ]
        heapq.heapify(heap)
        while heap:
            _, left, stop = heapq.heappop(heap)
            right = end[left]
            if right in (0, size) or end[right] != stop:
                continue
            end[left], end[right] = stop, 0
            if stop < size:
                before[stop] = left
            for start, finish in ((before[left], stop), (left, end[stop] if stop < size else left)):
                if start >= 0 and finish - start <= longest:
                    score = scores.get(word[start:finish])
                    if score is not None:
                        heapq.heappush(heap, (-score, start, finish))
        tokens: list[int] = []
        start = 0
        while start < size:
            text = word[start : end[start]]
            token = self._ids.get(text)
            tokens += (token,) if token is not None else byte_tokens(text, self._ids, self._unknown)
            start = end[start]
        return tokens


def byte_tokens(text: str, ids: Mapping[str, int], unknown: Sequence[int]) -> Sequence[int]:
    """Tokens for the bytes of a text, or `unknown` where one of them has none."""
    try:
        return [ids[f"<0x{byte:02X}>"] for byte in text.encode()]
    except KeyError:
        return unknown


def _mergeable(vocab: Vocabulary) -> list[int]:
    """Tokens that merges may make, best score first.

    Control tokens never come from text. Bytes are a way to write a text, not part of one. The user's own tokens are cut
    out before merging, except for those spelled with the sign for a space, which a text only has after that.
    """
    types = vocab.types.tolist()
    ids = [
        token
        for token, text in enumerate(vocab.tokens)
        if len(text) > 1
        and types[token] not in _NEVER_MERGED
        and (types[token] != TokenType.USER_DEFINED or SPACE in text)
    ]
    order = np.argsort(-vocab.scores[ids], kind="stable").tolist()
    return [ids[index] for index in order]


def _build_merger(vocab: Vocabulary, mergeable: Sequence[int]) -> Merger:
    ids = vocab.visible()
    unknown = () if vocab.unknown_id is None else (vocab.unknown_id,)
    texts = [vocab.tokens[token] for token in mergeable]
    loose = sorted(set().union(*texts) - ids.keys())
    fallbacks = {char: byte_tokens(char, ids, unknown) for char in loose}
    parts = {*ids, *fallbacks}
    rules: list[tuple[str, str]] = []
    previous = None
    for token, text in zip(mergeable, texts, strict=True):
        found = len(rules)
        for cut in range(1, len(text)):
            left = text[:cut]
            if left in parts:
                right = text[cut:]
                if right in parts:
                    rules.append((left, right))
        if len(rules) > found:
            score = vocab.scores[token]
            if score == previous:
                scores = dict(zip(texts, vocab.scores[list(mergeable)].tolist(), strict=True))
                return ScoreMerger(scores, ids, unknown)
            previous = score
    return BytePairMerger(ids, rules, size=len(vocab.tokens), fallbacks=fallbacks, unknown=unknown, byte_fallback=True)


class SentencePieceModel:
    """Cuts and merges plain text with a SentencePiece vocabulary (`llama`).

    Attributes:
      merge: ids of each of some words.
    """

    def __init__(self, vocab: Vocabulary) -> None:
        mergeable = _mergeable(vocab)
        self.merge = _build_merger(vocab, mergeable).merge
        # No merge crosses from a character to a space that follows it in no token, so words can be merged alone.
        before_space = {
            char
            for token in mergeable
            if vocab.tokens[token].rfind(SPACE) > 0
            for char, after in zip(vocab.tokens[token], vocab.tokens[token][1:], strict=False)
            if after == SPACE
        }
        stuck = re.escape("".join(sorted(before_space | {SPACE})))
        self._boundary = re.compile(f"(?<=[^{stuck}])(?={SPACE})")

    def words(self, text: str) -> list[str]:
        """A text (without surrogates) in parts that no merge crosses."""
        return self._boundary.split(text.replace(" ", SPACE))

    def spell(self, token: str) -> bytes:
        """The bytes an ordinary token stands for."""
        return token.replace(SPACE, " ").encode()
