"""Unicode classes of characters as pre-tokenizers see them, for whole texts at once.

A text becomes one byte a character: ASCII stays what it is, anything else becomes a byte that stands for its class.
Pre-tokenizer patterns then are patterns over bytes, which `re` runs fast and without a step per backtracked character.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
import numpy.typing as npt

LETTER, NUMBER, SPACE, PUNCTUATION, MARK, SYMBOL, OTHER, HAN, CAPITAL, SMALL = range(0x80, 0x8A)
"""The last three are no classes of `classify`: to most pre-tokenizers these characters are letters like others."""

_CLASS_OF_CATEGORY = {"L": LETTER, "N": NUMBER, "P": PUNCTUATION, "M": MARK, "S": SYMBOL}
_SPACES = (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)

# Nothing outside these blocks is assigned, apart from private use, which has no class.
_ASSIGNED_BLOCKS = ((0x80, 0x33480), (0xE0000, 0xE01F0))

# Python 3.11 knows Unicode 14 and 3.12 Unicode 15.0, the tokenizers' tables are 15.1: what came since 14.
_SINCE_UNICODE_14 = {
    LETTER: (
        *(range(0x1123F, 0x11241), range(0x11F02, 0x11F03), range(0x11F04, 0x11F11), range(0x11F12, 0x11F34)),
        *(range(0x1342F, 0x13430), range(0x13441, 0x13447), range(0x1B132, 0x1B133), range(0x1B155, 0x1B156)),
        *(range(0x1DF25, 0x1DF2B), range(0x1E030, 0x1E06E), range(0x1E4D0, 0x1E4EC), range(0x2B739, 0x2B73A)),
        *(range(0x2EBF0, 0x2EE5E), range(0x31350, 0x323B0)),
    ),
    NUMBER: (range(0x11F50, 0x11F5A), range(0x1D2C0, 0x1D2D4), range(0x1E4F0, 0x1E4FA)),
    PUNCTUATION: (range(0x11B00, 0x11B0A), range(0x11F43, 0x11F50)),
    MARK: (
        *(range(0xCF3, 0xCF4), range(0xECE, 0xECF), range(0x10EFD, 0x10F00), range(0x11241, 0x11242)),
        *(range(0x11F00, 0x11F02), range(0x11F03, 0x11F04), range(0x11F34, 0x11F3B), range(0x11F3E, 0x11F43)),
        *(range(0x13440, 0x13441), range(0x13447, 0x13456), range(0x1E08F, 0x1E090), range(0x1E4EC, 0x1E4F0)),
    ),
    SYMBOL: (
        *(range(0x2FFC, 0x3000), range(0x31EF, 0x31F0), range(0x1F6DC, 0x1F6DD), range(0x1F774, 0x1F777)),
        *(range(0x1F77B, 0x1F780), range(0x1F7D9, 0x1F7DA), range(0x1FA75, 0x1FA78), range(0x1FA87, 0x1FA89)),
        *(range(0x1FAAD, 0x1FAB0), range(0x1FABB, 0x1FABE), range(0x1FABF, 0x1FAC0), range(0x1FACE, 0x1FAD0)),
        *(range(0x1FADA, 0x1FADC), range(0x1FAE8, 0x1FAE9), range(0x1FAF7, 0x1FAF9)),
    ),
}

_HAN_RANGES = (
    ("\u3400", "\u4dbf"),
    ("\u4e00", "\u9fff"),
    ("\uf900", "\ufaff"),
    ("\U00020000", "\U0002a6df"),
    ("\U0002a700", "\U0002ebef"),
    ("\U0002f800", "\U0002fa1f"),
)


@functools.cache
def _class_table() -> npt.NDArray[np.uint8]:
    table = np.full(0x110000, OTHER, np.uint8)
    for start, stop in _ASSIGNED_BLOCKS:
        categories = map(unicodedata.category, map(chr, range(start, stop)))
        table[start:stop] = [_CLASS_OF_CATEGORY.get(category[0], OTHER) for category in categories]
    for value, ranges in _SINCE_UNICODE_14.items():
        for codes in ranges:
            table[codes.start : codes.stop] = value
    table[list(_SPACES)] = SPACE
    table[:0x80] = np.arange(0x80)
    return table


def classify(text: str) -> bytes:
    """One byte for each character of a text without surrogates."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return bytes(_class_table()[codes])


@functools.cache
def _cased_table() -> npt.NDArray[np.uint8]:
    table = _class_table().copy()
    letters = 0x80 + np.flatnonzero(table[0x80:] == LETTER)
    kinds = {"Lu": CAPITAL, "Lt": CAPITAL, "Ll": SMALL}
    table[letters] = [kinds.get(unicodedata.category(chr(code)), LETTER) for code in letters.tolist()]
    return table


def with_cases(text: str) -> bytes:
    """As `classify`, with capital (and title) and small letters apart from others."""
    return bytes(_cased_table()[np.frombuffer(text.encode("utf-32-le"), "<u4")])


def is_han(char: str) -> bool:
    """Whether a character is a Chinese one, to those pre-tokenizers that ask."""
    return char >= "\u3400" and any(first <= char <= last for first, last in _HAN_RANGES)
