"""Pre-tokenizers of byte-level BPE models: how a text is cut into the words that BPE merges never cross.

A GGUF file names its pre-tokenizer in `tokenizer.ggml.pre`. Each is one or more patterns, every pattern applied to the
pieces the one before left; the patterns and the names are those of llama.cpp. Those over classes of characters are
written over the bytes of `_unicode.classify`, those that name characters beyond ASCII over the text. Some need Chinese
characters told from other letters.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from atlas_jax.gguf._header import GGUFError, quote
from atlas_jax.gguf._unicode import HAN, SPACE, classify, is_han, with_cases

# Contents of character classes over classified bytes; see `_unicode` for the values from 0x80.
_L = r"A-Za-z\x80"
_N = r"0-9\x81"
_S = r" \t\n\r\f\v\x82"
_P = r"!-#%-*,-/:;?@\[-\]_{}\x83"
_M = r"\x84"
_HAN = r"\x87"
"""Chinese characters, in the patterns that name them; in all others they are letters."""
_SYMBOLS = r"$+<=>^`|~\x85"
# Letters that are not lower-case ASCII, and not upper-case ASCII: all that "upper" and "lower" mean to these models.
_UPPER = r"A-Z\x80"
_LOWER = r"a-z\x80"

# Capital and small letters beyond ASCII, in the patterns that tell them from others; in all others they are letters.
_CAPITAL, _SMALL = r"\x88", r"\x89"
_ANY_LETTER = rf"{_L}{_CAPITAL}{_SMALL}"
_CAPITALS = rf"[A-Z\x80{_CAPITAL}{_M}]"
_SMALLS = rf"[a-z\x80{_SMALL}{_M}]"

_SUFFIX = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_BLANKS = rf"[{_S}]+(?![^{_S}])|[{_S}]+"
_LINES = rf"[{_S}]*[\r\n]+|{_BLANKS}"
_WORD = rf"[^\r\n{_L}{_N}]?[{_L}]+"
_SIGNS = rf" ?[^{_S}{_L}{_N}]+"
_CASED_A = rf"[^\r\n{_L}{_N}]?[{_UPPER}]*[{_LOWER}]+"
_CASED_B = rf"[^\r\n{_L}{_N}]?[{_UPPER}]+[{_LOWER}]*"

# Of a text, in which every blank beyond ASCII has become U+000B.
_TEXT_BLANKS = r" \t\n\r\f\v"
_BLOOM = rf" ?[^({_TEXT_BLANKS}|.,!?…。，、।۔،)]+"
_DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"
# Letters of scripts that know upper and lower case, as first and last character of each run.
_LETTER_RUNS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 "
    "3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 "
    "1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe "
    "1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 "
    "2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 "
    "a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a "
    "10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
_DEEPSEEK_LETTERS = "".join("-".join(chr(int(end, 16)) for end in run.split("-")) for run in _LETTER_RUNS.split())

_CASED = rf"[^\r\n{_L}{_N}]?[{_L}{_M}]+(?:{_SUFFIX})?"
"""Where llama.cpp's classes of upper and lower case are all letters, and marks."""
_TURKISH = rf"{_WORD}|[{_N}]|{_SIGNS}[\r\n]*|{_LINES}"
_RUNS = "|".join(rf"[{_S}]{{{count}}}(?![^{_S}])" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
# Groups of three digits counted from the end of a number, so that its first group has one to three. It takes along what
# stands before the number, as llama.cpp does: the next pattern cuts that off, but sees that the number follows.
_DIGIT_GROUPS = rf"(?:[^{_N}]++|(?<![{_N}]))[{_N}]{{1,2}}(?=(?:[{_N}]{{3}})*(?![{_N}]))|[^{_N}]*+[{_N}]{{3}}|[^{_N}]+"
_DEEPSEEK3 = rf"[!-/:-@\[-`{{-~][A-Za-z]+|[^\r\n{_L}{_P}{_SYMBOLS}]?[{_L}{_M}]+| ?[{_P}{_SYMBOLS}]+[\r\n]*|{_LINES}"
_AFMOE_SCRIPTS = "[一-鿿㐀-䶿豈-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+"
_YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"

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


def _exact_cases(suffix: str, digits: str) -> str:
    """Words that end where a small letter is followed by a capital one."""
    before = rf"[^\r\n{_ANY_LETTER}{_N}]?"
    return (
        rf"{before}{_CAPITALS}*{_SMALLS}+{suffix}|{before}{_CAPITALS}+{_SMALLS}*{suffix}|{digits}"
        rf"| ?[^{_S}{_ANY_LETTER}{_N}]+[\r\n/]*|{_LINES}"
    )


_FAMILIES = (
    _Family(
        "gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4 jina-es jina-de "
        "jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe",
        (_GPT2,),
    ),
    _Family(
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        # GPT-2's pattern between numerals, each of which is a word.
        (rf"[{_N}]|'(?:[stmd]|re|ve|ll)| ?[{_L}]+|{_SIGNS}|[{_S}]+(?![^{_S}{_N}])|[{_S}]+",),
    ),
    _Family(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        (_LLAMA3,),
        ignore_merges=True,
        add_bos=True,
    ),
    _Family("dbrx smaug-bpe glm4 chatglm-bpe", (_LLAMA3,)),
    _Family("jais-2", (rf"{_SUFFIX}|{_WORD}|[{_N}]{{1,3}}|{_SIGNS}[\r\n]*|[{_S}]*[\r\n]+|{_RUNS}|[{_S}]",)),
    _Family(
        "minicpm5", (rf"[{_N}]{{1,3}}", rf"{_SUFFIX}|{_WORD}|[{_N}]+|{_SIGNS}[\r\n]*|{_LINES}"), ignore_merges=True
    ),
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
    _Family(
        "granite-embed-multi-97m",
        (
            rf"[^\r\n{_L}{_N}]?[{_UPPER}{_M}]*[{_LOWER}{_M}]+(?:{_SUFFIX})?|"
            rf"[^\r\n{_L}{_N}]?[{_UPPER}{_M}]+[{_LOWER}{_M}]*(?:{_SUFFIX})?|[{_N}]{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}",
        ),
        ignore_merges=True,
    ),
    _Family("tiny_aya cohere2moe", (_DIGIT_GROUPS, rf"{_CASED}|[{_N}]{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}")),
    _Family("youtu", (_YOUTU_SCRIPTS, rf"{_CASED}|[{_N}]|{_SIGNS}[\r\n/]*|{_LINES}"), ignore_merges=True),
    _Family(
        "kimi-k2",
        (
            rf"[{_HAN}]+|[^\r\n{_L}{_N}{_HAN}]?[{_L}]+(?:{_SUFFIX})?|[{_N}]{{1,3}}| ?[^{_S}{_L}{_N}{_HAN}]+[\r\n]*|"
            rf"{_LINES}",
        ),
    ),
    _Family(
        "exaone-moe",
        (rf"{_SUFFIX}|[^\r\n{_L}{_N}]?[{_L}](?:[{_M}]| ?[{_L}])*|[{_N}]|{_SIGNS}[\r\n/]?|[{_S}]*[\r\n]|{_BLANKS}",),
    ),
    _Family("ufakzeka", (_TURKISH,)),
    _Family("laguna", (r"[^\n]+|\n+", _QWEN2)),
    _Family(
        "chameleon",
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            "[\t\n]|    |  ",
            rf"[{_N}]",
            rf"[{_P}!-/:-@\[-`{{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    _Family("bailingmoe bailingmoe2 llada-moe", (_QWEN2,)),
    _Family(
        "seed-coder",
        (rf"{_SUFFIX}|{_WORD}|[{_N}]| ?[^{_S}{_L}{_N}\r\n]+|{_LINES}",),
    ),
    _Family(
        "deepseek-llm",
        (
            "[\r\n]",
            rf"[{_TEXT_BLANKS}]?[{_DEEPSEEK_LETTERS}]+",
            rf"[{_TEXT_BLANKS}]?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            rf"[{_S}]+\Z",
            _DEEPSEEK_HAN,
            rf"[{_N}]+",
        ),
    ),
    _Family("deepseek-coder", ("[\r\n]", rf"[{_S}]?[{_L}]+", rf"[{_S}]?[{_P}]+", _DEEPSEEK_HAN, rf"[{_N}]")),
    _Family(
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        (
            rf"[{_N}]{{1,3}}",
            "[一-龥぀-ゟ゠-ヿ]+",
            _DEEPSEEK3,
        ),
    ),
    _Family("afmoe", (_DIGIT_GROUPS, _AFMOE_SCRIPTS, _DEEPSEEK3)),
    _Family("bloom gpt3-finnish poro-chat", (_BLOOM,)),
    _Family("viking", (_BLOOM, rf"[{_N}]")),
    # The same as their namesakes, but as the description of their makers has it, not llama.cpp, to which all letters beyond
    # ASCII are both capital and small: no file names these, folders of safetensors do.
    _Family("atlas-tekken", (_exact_cases("", rf"[{_N}]"),), ignore_merges=True, add_bos=True),
    _Family("atlas-gpt-4o", (_exact_cases(rf"(?:{_SUFFIX})?", rf"[{_N}]{{1,3}}"),)),
    # a cut before each group of three digits, counted from the end of the number
    _Family("superbpe", (rf"[{_N}]+", "(?=(?:[0-9]{3})+(?![0-9]))")),
    _Family("falcon", (rf"[{_P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    _Family("default", (rf"[{_P}$+<=>^~|]+", _GPT2, rf"[{_N}]+", "[0-9][0-9][0-9]")),
)
_BY_NAME = {name: family for family in _FAMILIES for name in family.names.split()}


class PreTokenizer:
    """Cuts texts into words.

    Attributes:
      ignore_merges, add_bos: what the name says about the model beside the patterns.
    """

    __slots__ = ("_cases", "_han", "_patterns", "add_bos", "ignore_merges")

    def __init__(self, family: _Family) -> None:
        self._patterns = tuple(map(_compiled, family.patterns))
        self._cases = any(_CAPITAL in pattern for pattern in family.patterns)
        self._han = any(_HAN in pattern for pattern in family.patterns)
        self.ignore_merges = family.ignore_merges
        self.add_bos = family.add_bos

    def split(self, text: str) -> list[str]:
        """The words of a text (without surrogates), which joined are the text again."""
        classes = classify(text)
        folded = text
        if any(isinstance(pattern.pattern, str) for pattern in self._patterns) and not text.isascii():
            folded = "".join("\v" if kind == SPACE else char for char, kind in zip(text, classes, strict=True))
        if self._han and not text.isascii():
            classes = bytes(HAN if is_han(char) else kind for char, kind in zip(text, classes, strict=True))
        if self._cases and not text.isascii():
            classes = with_cases(text)
        ends = [len(text)]
        for pattern in self._patterns:
            subject: Any = folded if isinstance(pattern.pattern, str) else classes
            begin, pieces = 0, []
            for end in ends:
                if end - begin == 1:
                    pieces.append(end)
                    begin = end
                    continue
                for match in pattern.finditer(subject, begin, end):
                    if match.start() > begin:
                        pieces.append(match.start())
                    if match.end() > match.start():
                        pieces.append(match.end())
                    begin = match.end()
                if begin < end:
                    pieces.append(end)
                    begin = end
            ends = pieces
        return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _compiled(pattern: str) -> re.Pattern[Any]:
    """A pattern over classified bytes, or over the text if it names characters that have no class of their own."""
    return re.compile(pattern.encode()) if pattern.isascii() else re.compile(pattern)


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
