"""Real text around what is to be remembered: sentences of documents, as many as a distance needs."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from atlas_jax.evaluation.measures import Setup

# the two haystacks the published figures of facts were taken with, then prose and documentation of other kinds
_FIRST = (("documents", "docutils_pep258"), ("perplexity", "britannica"))
_CHARACTERS = 5
"""Of a token, at most: on English prose SmolLM2's have 4."""
_STEP = 8
"""Sentences that are added at a time."""


class Sentences:
    """The sentences of a text from a random place on, each given out once.

    Args:
      text: begins again at its first sentence where it ends.
    """

    def __init__(self, text: str, rng: random.Random, count: Callable[[str], int]) -> None:
        sentences = [
            " ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s+", text) if 20 < len(sentence) < 400
        ]
        start = rng.randrange(len(sentences))
        self._left = sentences[start:] + sentences[:start]
        self._count = count
        self._next = 0

    def one(self) -> str:
        """The next sentence."""
        self._next += 1
        return self._left[(self._next - 1) % len(self._left)]

    def of_tokens(self, tokens: int) -> list[str]:
        """Sentences of at least so many tokens, a few at a time."""
        out: list[str] = []
        counted, size = 0, 0
        while size < tokens:
            out += [self.one() for _ in range(_STEP)]
            # tokens of the parts, which is a little more or less than those of the whole; then exactly
            counted += self._count(" " + " ".join(out[-_STEP:]))
            size = counted if counted < tokens - 64 else self._count(" ".join(out))
        return out

    def up_to_tokens(self, tokens: int) -> list[str]:
        """Sentences of at most so many tokens."""
        out: list[str] = []
        size = 0
        while (size := size + self._count(" " + (sentence := self.one()))) <= tokens:
            out.append(sentence)
        return out


def haystack(setup: Setup, index: int, tokens: int) -> str:
    """The text of the context number `index`, long enough that no sentence comes twice if there is so much text."""
    texts = [
        (group, name, text) for group in ("documents", "perplexity") for name, text in setup.texts.group(group).items()
    ]
    prose = [one for one in texts if not _code(one[1])] or texts
    ranked = sorted(prose, key=lambda one: _FIRST.index(one[:2]) if one[:2] in _FIRST else len(_FIRST))
    heads = ranked[: len(_FIRST)]
    chosen = [heads[index % len(heads)]]
    others = [one for one in ranked if one is not chosen[0]]
    others = others[index % max(len(others), 1) :] + others[: index % max(len(others), 1)]
    books = [("books", name, text) for name, text in setup.texts.group("books").items()]
    books = books[index % max(len(books), 1) :] + books[: index % max(len(books), 1)]
    wanted = _CHARACTERS * (1.5 * tokens + 512)
    for one in [*others, *books]:
        if sum(len(text) for _, _, text in chosen) > wanted:
            break
        chosen.append(one)
    return "\n".join(text for _, _, text in chosen)


def _code(name: str) -> bool:
    return name in ("brotli_decoder", "trio_run", "alembic_html")


def joined(parts: Sequence[str]) -> str:
    """Sentences as running text."""
    return " ".join(parts)
