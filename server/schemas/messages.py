"""`/v1/messages`, as Anthropic's clients type it: request, message, events of a stream, error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from server.schemas.atlas import AtlasOptions, AtlasStats
from server.schemas.sampling import Fraction, TopK
from server.schemas.usage import Timings

StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


class Block(Struct, kw_only=True, frozen=True):
    """One part of a message; `text` parts are understood, and `thinking` is left out."""

    type: str
    text: str | None = None


class InputMessage(Struct, kw_only=True, frozen=True):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CountRequest(Struct, kw_only=True, frozen=True):
    """A conversation whose tokens are counted."""

    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=8192)]
    model: Annotated[str, Meta(max_length=512)] | None = None
    system: str | list[Block] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(CountRequest, kw_only=True, frozen=True):
    """A conversation to continue."""

    max_tokens: Annotated[int, Meta(ge=1, le=1 << 31)]
    metadata: dict[str, Any] | None = None
    stop_sequences: Annotated[list[Annotated[str, Meta(max_length=1024)]], Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: TopK | None = None
    top_p: Fraction | None = None
    atlas: AtlasOptions | None = None


class TokenCount(Struct, kw_only=True, frozen=True):
    """How many tokens a conversation has."""

    input_tokens: int


class TextBlock(Struct, kw_only=True, frozen=True):
    """Text of an answer."""

    text: str
    type: Literal["text"] = "text"
    citations: None = None


class MessageUsage(Struct, kw_only=True, frozen=True):
    """Token counts; `input_tokens` are those that had to be processed."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class Message(Struct, kw_only=True, frozen=True):
    """An answer."""

    id: str
    model: str
    content: list[TextBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    timings: Timings | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET


# --- events -----------------------------------------------------------------------------------------------------------
class MessageStart(Struct, kw_only=True, frozen=True):
    """The answer begins."""

    message: Message
    type: Literal["message_start"] = "message_start"


class ContentBlockStart(Struct, kw_only=True, frozen=True):
    """Its text begins."""

    index: int
    content_block: TextBlock
    type: Literal["content_block_start"] = "content_block_start"


class TextDelta(Struct, kw_only=True, frozen=True):
    """New text."""

    text: str
    type: Literal["text_delta"] = "text_delta"


class ContentBlockDelta(Struct, kw_only=True, frozen=True):
    """New text of a block."""

    index: int
    delta: TextDelta
    type: Literal["content_block_delta"] = "content_block_delta"


class ContentBlockStop(Struct, kw_only=True, frozen=True):
    """Its text has come to its end."""

    index: int
    type: Literal["content_block_stop"] = "content_block_stop"


class StopDelta(Struct, kw_only=True, frozen=True):
    """Why the answer has ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, kw_only=True, frozen=True):
    """The answer has ended."""

    delta: StopDelta
    usage: MessageUsage
    type: Literal["message_delta"] = "message_delta"
    timings: Timings | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET


class MessageStop(Struct, kw_only=True, frozen=True):
    """The stream has ended."""

    type: Literal["message_stop"] = "message_stop"
