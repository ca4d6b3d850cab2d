"""`POST /v1/completions`: request, response, and the chunk of a stream."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from server.schemas.atlas import AtlasStats, TokenGate
from server.schemas.shape import ShapedFields
from server.schemas.usage import Timings, Usage


class CompletionRequest(ShapedFields, kw_only=True, frozen=True):
    """Text to continue: a string, token ids, or a list of either."""

    # One array member only: msgspec cannot tell list[str] from list[int] before it has looked inside.
    prompt: str | Annotated[list[int | str | list[int]], Meta(max_length=1 << 21)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    suffix: str | None = None


class CompletionLogprobs(Struct, kw_only=True):
    """Log-probabilities of a completion, one entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct, kw_only=True, frozen=True):
    """One continuation, or the next piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_gates: list[TokenGate] | UnsetType = UNSET


class Completion(Struct, kw_only=True, frozen=True):
    """The response; in a stream every chunk has this shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET
