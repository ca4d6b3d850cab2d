"""What a session has read, remembered well enough to recognise it when a client sends it again.

Chat clients resend the whole conversation each turn. Of the text itself a session keeps one digest per page and the last
few thousand tokens: enough to find how far a prompt repeats it, at 8 bytes per 128 tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from atlas_jax.config import PAGE

_TAIL = 64 * PAGE
_DIGEST_SIZE = 8


@dataclass
class History:
    """Tokens of one session, in order.

    Attributes:
      length: tokens read.
      digests: after each full page, a digest of everything up to there.
      tail: the last tokens; those before `tail_start` are known by digest only.
      first_reply: position of the first token the model wrote, or None.
      replies: where the model wrote: begin and end of each of its answers that reaches into the tail, in order. An answer's
        last token counts as part of it, although it is read only with what follows.
      preamble: where what a chat last put before its first message (a system message) ends, and a digest of it; None if
        that is not known.
    """

    length: int = 0
    digests: list[bytes] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    first_reply: int | None = None
    replies: list[tuple[int, int]] = field(default_factory=list)
    preamble: tuple[int, bytes] | None = None

    @property
    def tail_start(self) -> int:
        """Position of the first token of the tail; a multiple of the page."""
        return self.length - len(self.tail)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens at the end."""
        start = self.tail_start
        self.tail.extend(tokens)
        self.length += len(tokens)
        while (len(self.digests) + 1) * PAGE <= self.length:
            at = len(self.digests) * PAGE - start
            before = self.digests[-1] if self.digests else b""
            self.digests.append(_digest(before, np.asarray(self.tail[at : at + PAGE], "<i4").tobytes()))
        surplus = len(self.tail) // PAGE * PAGE - _TAIL
        if surplus > 0:
            del self.tail[:surplus]
            self.replies = [one for one in self.replies if one[1] > self.tail_start]

    def answered(self, start: int, end: int) -> None:
        """Notes that the tokens from `start` up to `end` are the model's."""
        if self.first_reply is None:
            self.first_reply = start
        self.replies.append((start, end))

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on; what the tail no longer holds is known by digest only.

        Raises:
          ValueError: `length` lies before the tail and is not 0.
        """
        if length == self.length:
            return
        if length == 0:
            self.length, self.digests, self.tail, self.first_reply, self.replies, self.preamble = (
                0,
                [],
                [],
                None,
                [],
                None,
            )
            return
        if length < self.tail_start or length > self.length:
            raise ValueError(f"cannot truncate a history of {self.length} tokens to {length}")
        del self.tail[length - self.tail_start :]
        self.length = length
        del self.digests[length // PAGE :]
        self.forget_turns(length)

    def adopt_turns(self, other: History, length: int) -> None:
        """Takes over what is known of the turns in the first `length` tokens of another history.

        They are this one's too, or about to be read again.
        """
        if length < other.length:
            other = other.copy()
            other.forget_turns(length)
        self.first_reply, self.replies, self.preamble = other.first_reply, list(other.replies), other.preamble

    def forget_turns(self, length: int) -> None:
        """Forgets what is known of the turns from position `length` on; an answer that began there may have been edited."""
        if self.preamble is not None and self.preamble[0] > length:
            self.preamble = None
        if self.first_reply is not None and self.first_reply > length:
            self.first_reply = None
        self.replies = [(start, min(end, length)) for start, end in self.replies if start <= length]

    def copy(self) -> History:
        """An independent copy."""
        return replace(self, digests=list(self.digests), tail=list(self.tail), replies=list(self.replies))

    def tokens(self, start: int, end: int) -> list[int]:
        """The text from position `start`, which the tail must hold, up to `end`."""
        return self.tail[start - self.tail_start : end - self.tail_start] if start < end else []

    def common_prefix(self, prompt: Sequence[int] | np.ndarray) -> int:
        """How many leading tokens of `prompt` are known to be this history's own.

        Exact where the prompt departs within the tail; otherwise rounded down to a page.
        """
        prompt = np.ascontiguousarray(prompt, "<i4")
        data = memoryview(prompt.tobytes())
        size = PAGE * prompt.itemsize
        matched, digest = 0, b""
        for page in range(min(len(prompt) // PAGE, len(self.digests))):
            digest = _digest(digest, data[page * size : (page + 1) * size])
            if digest != self.digests[page]:
                break
            matched = page + 1
        known = matched * PAGE
        if known < self.tail_start:
            return known
        return known + shared(prompt[known:], np.asarray(self.tail[known - self.tail_start :], "<i4"))


def _digest(before: bytes, page: bytes | memoryview) -> bytes:
    return hashlib.blake2b(before + page, digest_size=_DIGEST_SIZE).digest()


def text_digest(tokens: Sequence[int]) -> bytes:
    """A digest of some tokens."""
    return _digest(b"", np.asarray(tokens, "<i4").tobytes())


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts begin with in common."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
