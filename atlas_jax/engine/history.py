"""What a session has read, remembered well enough to recognise it when a client sends it again.

Chat clients resend the whole conversation each turn. Of the text itself a session keeps one digest per page and the last
few thousand tokens: enough to find how far a prompt repeats it, at 8 bytes per 128 tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """

    length: int = 0
    digests: list[bytes] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    first_reply: int | None = None

    @property
    def tail_start(self) -> int:
        """Position of the first token of the tail; a multiple of the page."""
        return self.length - len(self.tail)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens at the end."""
        for token in tokens:
            self.tail.append(token)
            self.length += 1
            if self.length % PAGE == 0:
                before = self.digests[-1] if self.digests else b""
                self.digests.append(_digest(before, self.tail[-PAGE:]))
                if len(self.tail) >= _TAIL + PAGE:
                    del self.tail[:PAGE]

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on; what the tail no longer holds is known by digest only.

        Raises:
          ValueError: `length` lies before the tail and is not 0.
        """
        if length == 0:
            self.length, self.digests, self.tail, self.first_reply = 0, [], [], None
            return
        if length < self.tail_start or length > self.length:
            raise ValueError(f"cannot truncate a history of {self.length} tokens to {length}")
        del self.tail[length - self.tail_start :]
        self.length = length
        del self.digests[length // PAGE :]
        if self.first_reply is not None and self.first_reply >= length:
            self.first_reply = None

    def copy(self) -> History:
        """An independent copy."""
        return History(self.length, list(self.digests), list(self.tail), self.first_reply)

    def common_prefix(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of `prompt` are known to be this history's own.

        Exact where the prompt departs within the tail; otherwise rounded down to a page.
        """
        pages = min(len(prompt) // PAGE, len(self.digests))
        matched, digest = 0, b""
        for page in range(pages):
            digest = _digest(digest, prompt[page * PAGE : (page + 1) * PAGE])
            if digest != self.digests[page]:
                break
            matched = page + 1
        known = matched * PAGE
        if known < self.tail_start:
            return known
        limit = min(len(prompt), self.length)
        offset = self.tail_start
        while known < limit and prompt[known] == self.tail[known - offset]:
            known += 1
        return known


def _digest(before: bytes, page: Sequence[int]) -> bytes:
    data = np.asarray(page, "<i4").tobytes()
    return hashlib.blake2b(before + data, digest_size=_DIGEST_SIZE).digest()


@dataclass(frozen=True)
class Continuation:
    """How a prompt continues a session.

    Attributes:
      keep: tokens of the session's text the prompt builds on; less than its length means a rollback.
      append: the prompt is new text that follows the session's whole text, rather than a repeat of it.
    """

    keep: int
    append: bool


def continuation(history: History, prompt: Sequence[int]) -> Continuation:
    """Tells a continued conversation, an edited one and new text apart.

    * The prompt begins with everything the session has read: it goes on from there.
    * The prompt is a beginning of it, or repeats it at least up to the first reply and then departs: a regenerated or
      edited turn, which goes on from where they part.
    * Otherwise the client has sent only what is new, and it follows what the session has read.

    At least one token of the prompt is always left to process, for an answer starts from a token being read.
    """
    common = history.common_prefix(prompt)
    if common == history.length and len(prompt) > common:
        return Continuation(keep=common, append=False)
    edited = history.first_reply is not None and common >= history.first_reply
    if common == len(prompt) or edited:
        return Continuation(keep=min(common, len(prompt) - 1), append=False)
    return Continuation(keep=history.length, append=True)
