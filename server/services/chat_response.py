"""Builds OpenAI chat completions from the engine's events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec import UNSET, UnsetType

from atlas_jax.engine.api import Delta, Prompt, TokenInfo
from server.schemas.chat import (
    AnswerMessage,
    AnswerToolCall,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FunctionDelta,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from server.schemas.chat import FinishReason as AnswerReason
from server.schemas.usage import Usage
from server.services.response_builder import (
    Ending,
    FinishReason,
    Identification,
    Outcome,
    finish_reason,
    finite,
    token_gates,
)
from server.tool_calls.answer import AnswerReader
from server.tool_calls.pieces import CallArguments, CallBegun, Content, Piece, Reasoning

_ROLE = ChatDelta(role="assistant", content="")
_EMPTY = ChatDelta()


class ChatResponseBuilder:
    """Response and chunks of `/v1/chat/completions`.

    Log-probabilities and gates are those of all tokens of an answer, in order, whatever part of it they are. They come with
    the next part that comes out.

    Args:
      logprobs: whether the request asked for them.
      with_usage: whether every chunk carries a `usage` field.
      reader: makes what tells calls and reasoning from content, one for each answer.
      legacy: whether calls are `function_call`s, as before there were tools.
    """

    def __init__(
        self,
        identification: Identification,
        *,
        logprobs: bool,
        with_usage: bool,
        reader: Callable[[], AnswerReader] = AnswerReader,
        legacy: bool = False,
    ) -> None:
        self._is = identification
        self._logprobs = logprobs
        self._usage: UnsetType | None = None if with_usage else UNSET
        self._reader, self._legacy = reader, legacy
        self._opened: set[int] = set()
        self._readers: dict[int, AnswerReader] = {}
        self._tokens: dict[int, list[TokenInfo]] = {}  # whose text has not come out yet

    def chunks(self, index: int, event: Delta | Prompt) -> list[ChatChunk]:
        """Chunks for new text; the first of a sequence is preceded by its role."""
        out = self._role(index)
        if not isinstance(event, Delta):
            return out
        reader = self._readers.setdefault(index, self._reader())
        self._tokens.setdefault(index, []).extend(event.tokens)
        return out + self._pieces(index, reader.push(event.text), rest=reader.plain)

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> list[ChatChunk]:
        """The chunk with the finish reason."""
        reader = self._readers.setdefault(index, self._reader())
        out = [*self._role(index), *self._pieces(index, reader.finish(), rest=True)]
        choice = ChatChunkChoice(index=index, delta=_EMPTY, finish_reason=self._reason(reason, reader))
        return [*out, self._chunk([choice], self._usage, ending)]

    def usage(self, usage: Usage) -> ChatChunk:
        """The chunk without choices."""
        return self._chunk([], usage, None)

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> ChatCompletion:
        """The whole response."""
        choices = []
        for index, outcome in enumerate(outcomes):
            assert outcome.finished is not None
            reader = self._reader()
            pieces = [*reader.push(outcome.text), *reader.finish()]
            choices.append(
                ChatChoice(
                    index=index,
                    message=self._message(pieces),
                    logprobs=self._token_logprobs(outcome.tokens),
                    finish_reason=self._reason(finish_reason(outcome.finished), reader),
                    token_gates=token_gates(outcome.tokens),
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

    def _reason(self, reason: FinishReason, reader: AnswerReader) -> AnswerReason:
        if reason != "stop" or not reader.called:
            return reason
        return "function_call" if self._legacy else "tool_calls"

    def _message(self, pieces: Iterable[Piece]) -> AnswerMessage:
        content, reasoning, calls = "", "", list[tuple[str, str, list[str]]]()
        for piece in pieces:
            match piece:
                case Content(text):
                    content += text
                case Reasoning(text):
                    reasoning += text
                case CallBegun(_, id_, name):
                    calls.append((id_, name, []))
                case CallArguments(_, text):
                    calls[-1][2].append(text)
        made = [(id_, CalledFunction(name=name, arguments="".join(parts))) for id_, name, parts in calls]
        return AnswerMessage(
            content=content if content or not made else None,
            reasoning_content=reasoning or UNSET,
            tool_calls=[AnswerToolCall(id=id_, function=one) for id_, one in made]
            if made and not self._legacy
            else UNSET,
            function_call=made[0][1] if made and self._legacy else UNSET,
        )

    def _pieces(self, index: int, pieces: Sequence[Piece], *, rest: bool) -> list[ChatChunk]:
        """Chunks of what an answer has come to; with the `rest`, tokens without a text do not wait for one."""
        deltas = [self._delta(piece) for piece in pieces]
        tokens = self._tokens.get(index)
        if not deltas and rest and tokens:
            deltas = [ChatDelta(content="")]
        out = []
        for delta in deltas:
            choice = ChatChunkChoice(
                index=index,
                delta=delta,
                logprobs=self._token_logprobs(tokens or ()),
                token_gates=token_gates(tokens or ()),
            )
            out.append(self._chunk([choice], self._usage, None))
            if tokens:
                tokens.clear()
        return out

    def _delta(self, piece: Piece) -> ChatDelta:
        match piece:
            case Content(text):
                return ChatDelta(content=text)
            case Reasoning(text):
                return ChatDelta(reasoning_content=text)
            case CallBegun(index, id_, name):
                function = FunctionDelta(name=name, arguments="")
                call = ToolCallDelta(index=index, id=id_, type="function", function=function)
            case CallArguments(index, text):
                function = FunctionDelta(arguments=text)
                call = ToolCallDelta(index=index, function=function)
        return ChatDelta(function_call=function) if self._legacy else ChatDelta(tool_calls=[call])

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
