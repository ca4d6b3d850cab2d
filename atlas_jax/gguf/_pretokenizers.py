"""Pre-tokenizers of byte-level BPE models: how a text is cut into the words that BPE merges never cross.

A GGUF file names its pre-tokenizer in `tokenizer.ggml.pre`. Each is one or more patterns, every pattern applied to the
pieces the one before left; the patterns and the names are those of llama.cpp, written over the bytes of
`_unicode.classify`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from atlas_jax.gguf._header import GGUFError, quote
from atlas_jax.gguf._unicode import classify

# Contents of character classes over classified bytes; see `_unicode` for the values from 0x80.
_L = r"A-Za-z\x80"
_N = r"0-9\x81"
_S = r" \t\n\r\f\v\x82"
_P = r"!-#%-*,-/:;?@\[-\]_{}\x83"
_M = r"\x84"
# Letters that are not lower-case ASCII, and not upper-case ASCII: all that "upper" and "lower" mean to these models.
_UPPER = r"A-Z\x80"
_LOWER = r"a-z\x80"

_SUFFIX = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_BLANKS = rf"[{_S}]+(?![^{_S}])|[{_S}]+"
_LINES = rf"[{_S}]*[\r\n]+|{_BLANKS}"
_WORD = rf"[^\r\n{_L}{_N}]?[{_L}]+"
_SIGNS = rf" ?[^{_S}{_L}{_N}]+"
_CASED_A = rf"[^\r\n{_L}{_N}]?[{_UPPER}]*[{_LOWER}]+"
_CASED_B = rf"[^\r\n{_L}{_N}]?[{_UPPER}]+[{_LOWER}]*"

_GPT2 = rf"'(?:[stmd]|re|ve|ll)| ?[{_L}]+| ?[{_N}]+|{_SIGNS}|{_BLANKS}"
_LLAMA3 = rf"{_SUFFIX}|{_WORD}|[{_N}]{{1,3}}|{_SIGNS}[\r\n]*|{_LINES}"
_QWEN2 = rf"{_SUFFIX}|{_WORD}|[{_N}]|{_SIGNS}[\r\n]*|{_LINES}"


@dataclass(frozen=True, slots=True)
class _Family:
    """Pre-tokenizers that cut alike.

    Attributes:
      names: values of `tokenizer.ggml.pre`.
      ignore_merges: a word that is a token is that token, whatever the merges would make of it.
      add_bos: whether a BOS goes before a text if the file does not say.
    """

    names: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_FAMILIES = (
    _Family(
        "gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4",
        (_GPT2,),
    ),
    _Family(
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        # GPT-2's pattern between numerals, each of which is a word.
        (rf"[{_N}]|'(?:[stmd]|re|ve|ll)| ?[{_L}]+|{_SIGNS}|[{_S}]+(?![^{_S}{_N}])|[{_S}]+",),
    ),
    _Family(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        (_LLAMA3,),
        ignore_merges=True,
        add_bos=True,
    ),
    _Family("dbrx smaug-bpe", (_LLAMA3,)),
    _Family("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2", (_QWEN2,)),
    _Family(
        "qwen35",
        (rf"{_SUFFIX}|[^\r\n{_L}{_N}]?[{_L}{_M}]+|[{_N}]| ?[^{_S}{_L}{_M}{_N}]+[\r\n]*|{_LINES}",),
    ),
    _Family(
        "tekken",
        (rf"{_CASED_A}|{_CASED_B}|[{_N}]|{_SIGNS}[\r\n/]*|{_LINES}",),
        ignore_merges=True,
        add_bos=True,
    ),
    _Family(
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        (rf"{_CASED_A}(?:{_SUFFIX})?|{_CASED_B}(?:{_SUFFIX})?|[{_N}]{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}",),
    ),
    _Family("bailingmoe bailingmoe2 llada-moe", (_QWEN2,)),
    _Family(
        "seed-coder",
        (rf"{_SUFFIX}|{_WORD}|[{_N}]| ?[^{_S}{_L}{_N}\r\n]+|{_LINES}",),
    ),
    _Family("falcon", (rf"[{_P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    _Family("default", (rf"[{_P}$+<=>^~|]+", _GPT2, rf"[{_N}]+", "[0-9][0-9][0-9]")),
)
_BY_NAME = {name: family for family in _FAMILIES for name in family.names.split()}


class PreTokenizer:
    """Cuts texts into words.

    Attributes:
      ignore_merges, add_bos: what the name says about the model beside the patterns.
    """

    __slots__ = ("_patterns", "add_bos", "ignore_merges")

    def __init__(self, family: _Family) -> None:
        self._patterns = tuple(re.compile(pattern.encode()) for pattern in family.patterns)
        self.ignore_merges = family.ignore_merges
        self.add_bos = family.add_bos

    def split(self, text: str) -> list[str]:
        """The words of a text (without surrogates), which joined are the text again."""
        classes = classify(text)
        ends = [len(text)]
        for pattern in self._patterns:
            begin, pieces = 0, []
            for end in ends:
                if end - begin == 1:
                    pieces.append(end)
                    begin = end
                    continue
                for match in pattern.finditer(classes, begin, end):
                    if match.start() > begin:
                        pieces.append(match.start())
                    begin = match.end()
                    pieces.append(begin)
                if begin < end:
                    pieces.append(end)
                    begin = end
            ends = pieces
        return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@functools.cache
def pretokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of a `tokenizer.ggml.pre` value; an empty one means `default`.

    Raises:
      GGUFError: no pre-tokenizer of that name is known.
    """
    family = _BY_NAME.get(name or "default")
    if family is None:
        known = ", ".join(sorted(_BY_NAME))
        raise GGUFError(f"pre-tokenizer {quote(name)} (tokenizer.ggml.pre) is not known; known are {known}")
    return PreTokenizer(family)
