"""Builds OpenAI text completions from the engine's events."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from atlas_jax.engine.api import Delta, Prompt, TokenInfo
from server.schemas.atlas import TokenGate
from server.schemas.completions import Completion, CompletionChoice, CompletionLogprobs
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


class _Offsets:
    """Where in a choice's text the next token begins, in characters."""

    def __init__(self, at: int = 0) -> None:
        self._at = at
        self._open = b""  # bytes of a character that has begun

    def advance(self, data: bytes) -> int:
        """The offset of a token with these bytes; a token inside a character begins where the character does."""
        if self._open and data and not _begins(self._open + data[:1]):
            # the character never comes to its end, so it stands as U+FFFD before the token
            self._at, self._open = self._at + 1, b""
        start, data = self._at, self._open + data
        self._open = next((data[-size:] for size in (3, 2, 1) if _begins(data[-size:], ended=False)), b"")
        self._at += len(data[: len(data) - len(self._open)].decode("utf-8", "replace"))
        return start


def _begins(data: bytes, *, ended: bool = True) -> bool:
    """Whether bytes are the beginning of a character, or (`ended`) one or more whole ones."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return ended


_SPACE_MARK = "\u2581"


def _shown(text: str, tokens: Sequence[TokenInfo]) -> list[bytes]:
    """What each token of a prompt is of its text, which may have been given as tokens or as a text."""
    pieces = [token.data for token in tokens]
    found = _parts(text, pieces)
    if found is None:
        # to SentencePiece its mark is a space, and a token may say the one for the other
        text, pieces = text.replace(_SPACE_MARK, " "), [piece.replace(_SPACE_MARK.encode(), b" ") for piece in pieces]
        found = _parts(text, pieces)
    if found is not None:
        return found
    # A token the tokenizer added itself, and a space it put before a word, are no part of the text and take no room;
    # white space that a token swallowed goes with that token.
    data, at, shown = text.encode("utf-8", "replace"), 0, list[bytes]()
    for piece in pieces:
        blank = len(data) - len(data[at:].lstrip())
        places = ((piece, at), (piece.removeprefix(b" "), at), (piece, blank))
        own, begin = next(((one, begin) for one, begin in places if one and data.startswith(one, begin)), (b"", at))
        if shown:
            shown[-1] += data[at:begin]
        shown.append(own)
        at = begin + len(own)
    return shown


def _parts(text: str, pieces: Sequence[bytes]) -> list[bytes] | None:
    """The pieces less what the tokenizer put before them, if they are the text then."""
    for added in (0, 1):  # a beginning-of-text token
        own = [b"" if index < added else piece for index, piece in enumerate(pieces)]
        whole = b"".join(own)
        if whole.decode("utf-8", "replace") == text:
            return own
        if whole[:1] == b" " and whole[1:].decode("utf-8", "replace") == text:  # put before it by the tokenizer
            first = next(index for index, piece in enumerate(own) if piece)
            return [piece[1:] if index == first else piece for index, piece in enumerate(own)]
    return None


class CompletionResponseBuilder:
    """Response and chunks of `/v1/completions`.

    Args:
      echoes: the prompts' texts by prompt if the request asked for `echo`, else None.
      choices: sequences a prompt.
      logprobs: whether the request asked for them.
      with_usage: whether every chunk carries a `usage` field.
    """

    def __init__(
        self,
        identification: Identification,
        *,
        echoes: Sequence[str] | None,
        choices: int,
        logprobs: bool,
        with_usage: bool,
    ) -> None:
        self._is = identification
        self._echoes = echoes
        self._choices = choices
        self._logprobs = logprobs
        self._usage: UnsetType | None = None if with_usage else UNSET
        self._echoed: set[int] = set()
        self._offsets: dict[int, _Offsets] = {}

    def chunks(self, index: int, event: Delta | Prompt) -> list[Completion]:
        """Chunks for new text."""
        if isinstance(event, Prompt):
            return [self._chunk(index, self._echo(index), self._prompt_logprobs(index, event.tokens))]
        out = self._pending_echo(index)
        if event.text or event.tokens:
            logprobs = self._token_logprobs(index, event.tokens)
            out.append(self._chunk(index, event.text, logprobs, gates=token_gates(event.tokens)))
        return out

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> list[Completion]:
        """The chunk with the finish reason."""
        return [*self._pending_echo(index), self._chunk(index, "", None, reason, ending)]

    def usage(self, usage: Usage) -> Completion:
        """The chunk without choices."""
        return self._response([], usage, None)

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> Completion:
        """The whole response."""
        choices = []
        for index, outcome in enumerate(outcomes):
            assert outcome.finished is not None
            logprobs = self._prompt_logprobs(index, outcome.prompt)
            _extend(logprobs, self._token_logprobs(index, outcome.tokens))
            choices.append(
                CompletionChoice(
                    index=index,
                    text=self._echo(index) + outcome.text,
                    logprobs=logprobs,
                    finish_reason=finish_reason(outcome.finished),
                    token_gates=token_gates(outcome.tokens),
                )
            )
        return self._response(choices, usage, ending)

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: CompletionLogprobs | None,
        reason: FinishReason | None = None,
        ending: Ending | None = None,
        gates: list[TokenGate] | UnsetType = UNSET,
    ) -> Completion:
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason, token_gates=gates)
        return self._response([choice], self._usage, ending)

    def _response(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None, ending: Ending | None
    ) -> Completion:
        return Completion(
            id=self._is.id,
            created=self._is.created,
            model=self._is.model,
            system_fingerprint=self._is.system_fingerprint,
            choices=choices,
            usage=usage,
            timings=UNSET if ending is None else ending.timings,
            atlas_stats=UNSET if ending is None else ending.atlas_stats,
        )

    def _echo(self, index: int) -> str:
        self._echoed.add(index)
        return "" if self._echoes is None else self._echoes[index // self._choices]

    def _pending_echo(self, index: int) -> list[Completion]:
        if self._echoes is None or index in self._echoed:
            return []
        return [self._chunk(index, self._echo(index), None)]

    def _prompt_logprobs(self, index: int, tokens: Sequence[TokenInfo]) -> CompletionLogprobs | None:
        if not self._logprobs:
            return None
        out = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        if self._echoes is None:
            return out
        offsets, text = _Offsets(), self._echoes[index // self._choices]
        for token, shown in zip(tokens, _shown(text, tokens), strict=True):
            _add(out, token, offsets.advance(shown))
        return out

    def _token_logprobs(self, index: int, tokens: Sequence[TokenInfo]) -> CompletionLogprobs | None:
        if not self._logprobs:
            return None
        if index not in self._offsets:
            echo = "" if self._echoes is None else self._echoes[index // self._choices]
            self._offsets[index] = _Offsets(len(echo))
        out = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token in tokens:
            _add(out, token, self._offsets[index].advance(b"" if token.hidden else token.data))
        return out


def _add(out: CompletionLogprobs, token: TokenInfo, offset: int) -> None:
    out.text_offset.append(offset)
    out.tokens.append(_text(token.data))
    if token.logprob is None:
        out.token_logprobs.append(None)
        out.top_logprobs.append(None)
        return
    top: dict[str, float] = {}
    for _, data, logprob in token.top:
        top.setdefault(_text(data), finite(logprob))
    top.setdefault(_text(token.data), finite(token.logprob))
    out.token_logprobs.append(finite(token.logprob))
    out.top_logprobs.append(top)


def _extend(out: CompletionLogprobs | None, more: CompletionLogprobs | None) -> None:
    if out is None or more is None:
        return
    out.text_offset += more.text_offset
    out.tokens += more.tokens
    out.token_logprobs += more.token_logprobs
    out.top_logprobs += more.top_logprobs


def _text(data: bytes) -> str:
    """A token as OpenAI's API writes it: text, or the escaped bytes of a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
