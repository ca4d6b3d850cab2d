"""`/v1/messages`, as Anthropic's clients type it: request, message, events of a stream, error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from server.schemas.atlas import AtlasOptions, AtlasStats
from server.schemas.sampling import Fraction, TopK
from server.schemas.usage import Timings

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ResultBlock(Struct, kw_only=True, frozen=True):
    """One part of a tool's result; `text` parts are understood."""

    type: str
    text: str | None = None


class Block(Struct, kw_only=True, frozen=True):
    """One part of a message: text, thinking, the use of a tool or its result; which fields there are depends on the type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: Annotated[str, Meta(max_length=256)] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Annotated[str, Meta(max_length=256)] | None = None
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None


class InputMessage(Struct, kw_only=True, frozen=True):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Struct, kw_only=True, frozen=True):
    """A tool the model may use; those that run at Anthropic have other types and are refused."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    type: str | None = None


class AnthropicToolChoice(Struct, kw_only=True, frozen=True):
    """Whether a tool must be used, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(Struct, kw_only=True, frozen=True):
    """Whether the model shall think before it answers, where its template knows of that; the budget is a hint."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None


class OutputConfig(Struct, kw_only=True, frozen=True):
    """What the answer must look like; `effort` is a hint."""

    format: dict[str, Any] | None = None
    effort: Annotated[str, Meta(max_length=64)] | None = None


class CountRequest(Struct, kw_only=True, frozen=True):
    """A conversation whose tokens are counted."""

    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=8192)]
    model: Annotated[str, Meta(max_length=512)] | None = None
    system: str | list[Block] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=128)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None


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


class TextBlock(Struct, kw_only=True, frozen=True, tag_field="type", tag="text"):
    """Text of an answer."""

    text: str


class ThinkingBlock(Struct, kw_only=True, frozen=True, tag_field="type", tag="thinking"):
    """What the model has thought; there is nothing to sign."""

    thinking: str
    signature: str = ""


class ToolUseBlock(Struct, kw_only=True, frozen=True, tag_field="type", tag="tool_use"):
    """The use of a tool; without input where the answer was cut short in it."""

    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


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
    content: list[AnswerBlock]
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
    """A block of it begins."""

    index: int
    content_block: AnswerBlock
    type: Literal["content_block_start"] = "content_block_start"


class TextDelta(Struct, kw_only=True, frozen=True, tag_field="type", tag="text_delta"):
    """New text."""

    text: str


class ThinkingDelta(Struct, kw_only=True, frozen=True, tag_field="type", tag="thinking_delta"):
    """More of what the model thinks."""

    thinking: str


class InputJsonDelta(Struct, kw_only=True, frozen=True, tag_field="type", tag="input_json_delta"):
    """More of a tool's input, as JSON."""

    partial_json: str


class ContentBlockDelta(Struct, kw_only=True, frozen=True):
    """A block goes on."""

    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta
    type: Literal["content_block_delta"] = "content_block_delta"


class ContentBlockStop(Struct, kw_only=True, frozen=True):
    """A block has come to its end."""

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
