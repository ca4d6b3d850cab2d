"""How far one answer has come in its grammar, and which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from atlas_jax.grammar.wire import COMPLETE, FAILED, MAY_GO_ON, mask_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_DIGITS = 20
"""Digits that may follow each other in a number: as many as a whole number of 64 bits has. JSON allows any number of them,
and greedy decoding writes them until its tokens are used up."""
_EXPONENT_DIGITS = 2


class Spelling(Protocol):
    """A tokenizer, as much of it as a grammar needs."""

    vocab_size: int
    eog_ids: frozenset[int]

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""

    def is_special(self, token: int) -> bool:
        """Whether a token is no part of the text."""


class Tokens:
    """A tokenizer as llguidance knows it, made once for all grammars.

    Attributes:
      known: llguidance's.
      texts: bytes of each token, none for special ones.
      digits: a bit for every token that begins with a digit, as uint8.
      controls: the control tokens by their names.
    """

    def __init__(self, tokenizer: Spelling) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = sorted(tokenizer.eog_ids)
        view = _View(tokenizer, ends[0])
        self.known: LLTokenizer = LLTokenizer(TokenizerWrapper(view), eos_token=ends)
        special = set(view.special_token_ids)
        self.controls = {view.tokens[token].decode("utf-8", "replace"): token for token in sorted(special)}
        self.texts = [b"" if token in special else text for token, text in enumerate(view.tokens)]
        begins = np.array([text[:1].isdigit() for text in self.texts], bool)
        bits = np.packbits(begins, bitorder="little")
        self.digits = np.zeros(mask_bytes(len(self.texts)), np.uint8)
        self.digits[: len(bits)] = bits


class _View:
    """The tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Spelling, end: int) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = end
        self.bos_token_id = None
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(token) for token in ids]
        self.special_token_ids = [token for token in ids if tokenizer.is_special(token)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)


class Answer:
    """One answer.

    Attributes:
      mask: after a verdict of `MAY_GO_ON`, a bit for every token that may come next, as uint8.
      error: after a verdict of `FAILED`, why.
    """

    def __init__(
        self,
        start: LLMatcher,
        tokens: Tokens,
        opens: Sequence[str] = (),
        *,
        canonical: bool = False,
        numbers: bool = True,
    ) -> None:
        """Begins one; `start` stays as it is.

        Args:
          opens: texts that end the part of the answer that is free, in which numbers may have any length.
          canonical: where the grammar leaves no choice, take the tokens that the tokenizer makes of the text.
          numbers: whether numbers, those of JSON, end after some digits where the grammar lets them.
        """
        self._matcher = start.deep_copy()
        self._tokens = tokens
        self._numbers = _Numbers() if numbers else None
        self._opens = [text.encode() for text in opens]
        self._opening = {tokens.controls.get(text, -1) for text in opens}
        self._free = b""
        self._canonical = canonical
        self.mask = np.zeros_like(tokens.digits)
        self.error = ""

    def take(self, token: int | None) -> int:
        """Goes on by a token, or begins, and says what may follow: a verdict of `wire`."""
        matcher = self._matcher
        if token is not None:
            matcher.consume_token(token)
            self._read(token)
            if not matcher.is_error() and matcher.is_stopped():
                return COMPLETE
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        if matcher.is_error():
            self.error = matcher.get_error()
            return FAILED
        if self._canonical and (forced := matcher.compute_ff_tokens()):
            byte, bit = divmod(forced[0], 8)
            if self.mask[byte] & (1 << bit):
                self.mask[:] = 0
                self.mask[byte] = 1 << bit
        elif self._numbers is not None and self._numbers.long:
            shorter = self.mask & ~self._tokens.digits
            if shorter.any():
                self.mask = shorter
        return MAY_GO_ON

    def _read(self, token: int) -> None:
        if self._numbers is None:
            return
        text = self._tokens.texts[token]
        if self._opens:
            self._free += text
            if token not in self._opening and not any(one in self._free for one in self._opens):
                self._free = self._free[-max(map(len, self._opens)) :]
                return
            self._opens = []
        self._numbers.read(text)


class _Numbers:
    """Finds the numbers of a JSON text and whether the one it ends in is long enough.

    Attributes:
      long: whether no further digit should follow if none must.
    """

    def __init__(self) -> None:
        self._in_string = self._escaped = False
        self._digits = 0
        self._most = _DIGITS

    @property
    def long(self) -> bool:
        return self._digits >= self._most

    def read(self, data: bytes) -> None:
        """Goes on by the bytes of a token."""
        for byte in data:
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == 0x5C:  # \
                    self._escaped = True
                elif byte == 0x22:  # "
                    self._in_string = False
                continue
            if 0x30 <= byte <= 0x39:
                self._digits += 1
                continue
            if byte in b"eE" and self._digits:
                self._most = _EXPONENT_DIGITS
            elif byte not in b"+-":
                self._most = _DIGITS
            self._digits = 0
            self._in_string = byte == 0x22
