"""The error bodies."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class OpenAIErrorBody(Struct, kw_only=True, frozen=True):
    """OpenAI's error object; the token counts are there when a prompt did not fit the context."""

    message: str
    type: str
    param: str | None
    code: str | None
    n_prompt_tokens: int | UnsetType = UNSET
    n_ctx: int | UnsetType = UNSET


class OpenAIError(Struct, kw_only=True, frozen=True):
    """Every error outside `/v1/atlas/*`, `/v1/messages` and `/api/*`."""

    error: OpenAIErrorBody


class AtlasErrorBody(Struct, kw_only=True, frozen=True):
    """`code` is the HTTP status, `timestamp` Unix seconds."""

    code: int
    message: str
    type: str
    param: str | None
    timestamp: int


class AtlasError(Struct, kw_only=True, frozen=True):
    """Every error of `/v1/atlas/*`."""

    error: AtlasErrorBody


class AnthropicErrorDetails(Struct, kw_only=True, frozen=True):
    """Why a conversation cannot be kept for a client; one that was told this sends all of it each time."""

    error_code: Literal["thread_unsupported_request"] = "thread_unsupported_request"
    unsupported: tuple[Literal["thread"]] = ("thread",)


class AnthropicErrorBody(Struct, kw_only=True, frozen=True):
    """What went wrong; the message names the field."""

    type: str
    message: str
    details: AnthropicErrorDetails | UnsetType = UNSET


class AnthropicError(Struct, kw_only=True, frozen=True):
    """Every error of `/v1/messages`, and the last event of a stream that has failed."""

    error: AnthropicErrorBody
    type: Literal["error"] = "error"


class OllamaError(Struct, kw_only=True, frozen=True):
    """Every error of `/api/*`, and the last line of a stream that has failed."""

    error: str
