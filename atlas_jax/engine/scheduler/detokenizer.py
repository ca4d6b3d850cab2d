"""From token ids to what a listener hears: whole characters, stop strings found and cut, log-probabilities in step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from atlas_jax.engine.api import Delta, TokenInfo
from atlas_jax.gguf import StreamDecoder, Tokenizer


class Detokenizer:
    """Text of one answer as it grows.

    Text that could be the beginning of a stop string is held back until it is certain; tokens are delivered with the
    text they complete.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], *, with_tokens: bool, shown: Collection[str] = ()
    ) -> None:
        """Begins an answer.

        Args:
          shown: names of control tokens that are part of the text.
        """
        known = tokenizer.special_tokens
        ids = {known[name] for name in shown if name in known}
        self._decoder = StreamDecoder(tokenizer, skip_special=True, shown=ids, starts_text=False)
        self._stop = [text for text in stop if text]
        self._with_tokens = with_tokens
        self._held = ""
        self._sent = 0
        self._seen = 0
        self._waiting: list[tuple[int, TokenInfo]] = []  # (characters of text once the token is complete, token)
        self.matched: str | None = None

    def push(self, token: int, info: TokenInfo | None) -> Delta | None:
        """Takes a token; returns new text, or None if there is none to send yet. Sets `matched` at a stop string."""
        text = self._decoder.push(token)
        self._seen += len(text)
        if info is not None and self._with_tokens:
            self._waiting.append((self._seen, info))
        self._held += text
        found = self._first_stop()
        if found is not None:
            position, self.matched = found
            return self._send(self._held[:position], final=True)
        return self._send(self._held[: len(self._held) - self._possible_stop()], final=False)

    def finish(self) -> Delta | None:
        """The rest, when the answer ends for another reason."""
        if self.matched is not None:
            return None
        tail = self._decoder.flush()
        self._seen += len(tail)
        self._held += tail
        found = self._first_stop()
        if found is not None:
            position, self.matched = found
            return self._send(self._held[:position], final=True)
        return self._send(self._held, final=True)

    def _send(self, text: str, *, final: bool) -> Delta | None:
        self._held = self._held[len(text) :]
        self._sent += len(text)
        count = 0
        for end, _ in self._waiting:
            # a token cut by a stop string goes with the text it began; one wholly after the cut is dropped
            if end > self._sent and not (final and self.matched is None):
                break
            count += 1
        tokens = tuple(info for _, info in self._waiting[:count])
        del self._waiting[:count]
        return Delta(text, tokens) if text or tokens else None

    def _first_stop(self) -> tuple[int, str] | None:
        hits = [(position, text) for text in self._stop if (position := self._held.find(text)) >= 0]
        return min(hits, default=None, key=lambda hit: hit[0])

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that some stop string begins with."""
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:length]):
                    longest = length
                    break
        return longest


def token_info(
    tokenizer: Tokenizer,
    token: int,
    logprob: float | None,
    tokens: object,
    logprobs: object,
    *,
    gate: float | None = None,
) -> TokenInfo:
    """A token, its log-probability, its alternatives with theirs, best first, and its gate if that was asked for."""
    pairs = zip(np.asarray(tokens, np.int64).tolist(), np.asarray(logprobs, np.float64).tolist(), strict=True)
    top = tuple((other, tokenizer.token_bytes(other), value) for other, value in pairs)
    return TokenInfo(token, tokenizer.token_bytes(token), logprob, top, tokenizer.is_special(token), gate)
