"""Byte-pair merging of words into token ids, with the merge engine of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import models

from atlas_jax.gguf._header import GGUFError, quote


def _byte_alphabet() -> str:
    """The character that stands for each byte in byte-level vocabularies (GPT-2).

    Bytes that print in Latin-1 stand for themselves, the others take the characters from U+0100 in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(0x100))


BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF = {ord(char): byte for byte, char in enumerate(BYTE_ALPHABET)}


def to_byte_level(word: str) -> str:
    """A word as byte-level vocabularies spell it: one character for each byte of its UTF-8."""
    return word.encode().decode("latin-1").translate(BYTE_ALPHABET)


def from_byte_level(text: str) -> bytes:
    """The bytes a byte-level token stands for; a text with a character outside the alphabet stands for itself."""
    try:
        return bytes([_BYTE_OF[ord(char)] for char in text])
    except KeyError:
        return text.encode()


class BytePairMerger:
    """Merges the characters of words by rank until no rule applies, leftmost pair first.

    `tokenizers` runs each word in O(n log n). Two things are not its own but llama.cpp's: a character that is no token
    blocks merges and may have tokens to stand for it, and characters that are no tokens can still merge into one. Such
    characters get ids past the vocabulary.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: list[tuple[str, str]],
        *,
        size: int,
        fallbacks: Mapping[str, Sequence[int]],
        unknown: Sequence[int] = (),
        byte_fallback: bool = False,
        ignore_merges: bool = False,
        spell: Callable[[str], str] = str,
    ) -> None:
        """Builds the engine.

        Args:
          vocab: token texts that may come out, and their ids below `size`.
          merges: pairs of texts, best first, none twice; both and their join are in `vocab` or `fallbacks`.
          fallbacks: what stands for characters that take part in merges and are no tokens.
          unknown: what stands for any other character that is no token.
          byte_fallback: tokens `<0xXX>` of the vocabulary stand for the bytes of such a character.
          ignore_merges: a word that is a token is that token, whatever the merges would make of it.
          spell: a word as the vocabulary spells it.
        """
        ids = {**vocab, **{char: size + 1 + index for index, char in enumerate(fallbacks)}}
        absent = "\0absent"
        while absent in ids:
            absent += "\0"
        ids[absent] = size
        self._size = size
        self._spell = spell
        self._stand_ins = (tuple(unknown), *map(tuple, fallbacks.values()))
        model = models.BPE(
            vocab=ids,
            merges=merges,
            unk_token=absent,
            fuse_unk=False,
            byte_fallback=byte_fallback,
            ignore_merges=ignore_merges,
        )
        self._engine = tokenizers.Tokenizer(model)

    def merge(self, words: Sequence[str]) -> dict[str, list[int]]:
        """Ids of each of some different words, found in one call that does not hold the interpreter lock."""
        spelled = [self._spell(word) for word in words]
        if len(words) == 1:
            whole = self._engine.encode_batch_fast([spelled], is_pretokenized=True, add_special_tokens=False)[0]
            return {words[0]: self._resolve(whole.ids)}
        encoding = self._engine.encode_batch([spelled], is_pretokenized=True, add_special_tokens=False)[0]
        ids: list[int] = encoding.ids
        ends = np.searchsorted(np.array(encoding.word_ids), np.arange(1, len(words) + 1)).tolist()
        pieces: Iterator[list[int]] = (ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False))
        if max(ids, default=0) >= self._size:
            pieces = map(self._resolve, pieces)
        return dict(zip(words, pieces, strict=True))

    def _resolve(self, ids: list[int]) -> list[int]:
        """Replaces ids past the vocabulary by what stands for them."""
        return [token for raw in ids for token in ((raw,) if raw < self._size else self._stand_ins[raw - self._size])]


def parse_merges(merges: Iterable[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The rules of `tokenizer.ggml.merges`, each two texts with a space between them.

    Rules that cannot make a token of `vocab` from two others are left out, and so are repetitions.

    Raises:
      GGUFError: names the first rule that is not two texts.
    """
    rules: dict[tuple[str, str], None] = {}
    for index, rule in enumerate(merges):
        space = rule.find(" ", 1)
        if space < 0:
            raise GGUFError(f"merge {index} of tokenizer.ggml.merges is {quote(rule)}, not two tokens")
        left, right = rule[:space], rule[space + 1 :]
        if left in vocab and right in vocab and left + right in vocab:
            rules[left, right] = None
    return list(rules)
