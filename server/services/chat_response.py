"""Builds OpenAI chat completions from the engine's events."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from atlas_jax.engine.api import Delta, Prompt, TokenInfo
from server.schemas.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    TokenLogprob,
    TopLogprob,
)
from server.schemas.usage import Usage
from server.services.response_builder import Ending, FinishReason, Identification, Outcome, finish_reason, finite

_ROLE = ChatDelta(role="assistant", content="")
_EMPTY = ChatDelta()


class ChatResponseBuilder:
    """Response and chunks of `/v1/chat/completions`.

    Args:
      logprobs: whether the request asked for them.
      with_usage: whether every chunk carries a `usage` field.
    """

    def __init__(self, identification: Identification, *, logprobs: bool, with_usage: bool) -> None:
        self._is = identification
        self._logprobs = logprobs
        self._usage: UnsetType | None = None if with_usage else UNSET
        self._opened: set[int] = set()

    def chunks(self, index: int, event: Delta | Prompt) -> list[ChatChunk]:
        """Chunks for new text; the first of a sequence is preceded by its role."""
        out = self._role(index)
        if isinstance(event, Delta) and (event.text or event.tokens):
            choice = ChatChunkChoice(
                index=index, delta=ChatDelta(content=event.text), logprobs=self._token_logprobs(event.tokens)
            )
            out.append(self._chunk([choice], self._usage, None))
        return out

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> list[ChatChunk]:
        """The chunk with the finish reason."""
        choice = ChatChunkChoice(index=index, delta=_EMPTY, finish_reason=reason)
        return [*self._role(index), self._chunk([choice], self._usage, ending)]

    def usage(self, usage: Usage) -> ChatChunk:
        """The chunk without choices."""
        return self._chunk([], usage, None)

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> ChatCompletion:
        """The whole response."""
        choices = []
        for index, outcome in enumerate(outcomes):
            assert outcome.finished is not None
            choices.append(
                ChatChoice(
                    index=index,
                    message=AnswerMessage(content="".join(outcome.text)),
                    logprobs=self._token_logprobs(outcome.tokens),
                    finish_reason=finish_reason(outcome.finished),
                )
            )
        return ChatCompletion(
            id=self._is.id,
            created=self._is.created,
            model=self._is.model,
            system_fingerprint=self._is.system_fingerprint,
            choices=choices,
            usage=usage,
            timings=ending.timings,
            atlas_stats=ending.atlas_stats,
        )

    def _role(self, index: int) -> list[ChatChunk]:
        if index in self._opened:
            return []
        self._opened.add(index)
        return [self._chunk([ChatChunkChoice(index=index, delta=_ROLE)], self._usage, None)]

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None, ending: Ending | None
    ) -> ChatChunk:
        return ChatChunk(
            id=self._is.id,
            created=self._is.created,
            model=self._is.model,
            system_fingerprint=self._is.system_fingerprint,
            choices=choices,
            usage=usage,
            timings=UNSET if ending is None else ending.timings,
            atlas_stats=UNSET if ending is None else ending.atlas_stats,
        )

    def _token_logprobs(self, tokens: Sequence[TokenInfo]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(content=token_logprobs(tokens))


def token_logprobs(tokens: Sequence[TokenInfo]) -> list[TokenLogprob]:
    """The log-probabilities of an answer's tokens."""
    return [
        TokenLogprob(
            token=_text(token.data),
            logprob=finite(token.logprob or 0.0),
            bytes=list(token.data),
            top_logprobs=[
                TopLogprob(token=_text(data), logprob=finite(logprob), bytes=list(data))
                for _, data, logprob in token.top
            ],
        )
        for token in tokens
    ]


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
