"""A made-up text that asks for what it said long before: shows which layers' states can find a fact again.

Late layers hold what comes next in ordinary text, middle layers what was talked about. On SmolLM2-135M, keys of layer 27
close as much of the gap on documents as those of layer 18 (0.42 and 0.43), but find 0.30 of the digits of facts stated
2 000 tokens ago where layer 18 finds 0.70 (exact solve, teacher-forced). Ordinary text alone cannot tell the two apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

_OWNERS = (
    "tall baker", "old sailor", "young painter", "blind organist", "quiet miller", "lame courier", "red-haired cook",
    "new porter", "second cousin", "night watchman", "retired judge", "travelling dentist",
)  # fmt: skip
_STATED = "The locker number of the {owner} was{code}."
_ASKED = (
    "The locker number of the {owner} was{code}.",
    "When the {owner} was asked which locker, the answer was{code}.",
)
_DIGITS = 5


@dataclass(frozen=True)
class Probe:
    """A text and where it repeats facts.

    Attributes:
      tokens: the text.
      asked: positions after which a token of a stated fact comes again.
    """

    tokens: list[int]
    asked: list[int]


def make_probe(filler: str, encode: Callable[[str], list[int]], between: int, seed: int = 0) -> Probe:
    """Facts between a text's sentences, at least `between` tokens of it, and the facts again in the same and other words.

    Args:
      filler: ordinary prose.
      encode: tokens of a piece of text, without special ones.
    """
    rng = random.Random(seed)
    sentences = [" " + " ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", filler) if 20 < len(part) < 300]
    facts = [(owner, "".join(rng.choices("0123456789", k=_DIGITS))) for owner in _OWNERS]
    tokens: list[int] = []
    asked: list[int] = []
    for owner, code in facts:
        tokens += encode(sentences.pop(0)) + encode(" " + _STATED.format(owner=owner, code=" " + code))
    until = len(tokens) + between
    while len(tokens) < until and sentences:
        tokens += encode(sentences.pop(0))
    for wording in _ASKED:
        for owner, code in facts:
            before, after = (" " + wording).split("{code}")
            tokens += encode(before.format(owner=owner))
            answer = encode(" " + code)
            digits = min(_DIGITS, len(answer))  # fewer where the tokenizer joins digits
            tokens += answer
            asked += range(len(tokens) - 1 - digits, len(tokens) - 1)
            tokens += encode(after)
    return Probe(tokens, asked)
