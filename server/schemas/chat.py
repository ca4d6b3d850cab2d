"""`POST /v1/chat/completions`: request, response, and the chunk of a stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from server.schemas.atlas import AtlasStats, TokenGate
from server.schemas.sampling import TokenCount
from server.schemas.shape import ShapedFields
from server.schemas.usage import Timings, Usage


class ContentPart(Struct, kw_only=True, frozen=True):
    """One part of a message; `text` and `refusal` parts are understood."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Struct, kw_only=True, frozen=True):
    """A call of a function in the conversation; the arguments are JSON in a string, or an object."""

    name: Annotated[str, Meta(max_length=256)]
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Struct, kw_only=True, frozen=True):
    """A call of a tool in the conversation."""

    function: FunctionCall
    id: Annotated[str, Meta(max_length=256)] | None = None
    type: Literal["function"] = "function"


class FunctionDefinition(Struct, kw_only=True, frozen=True):
    """A function the model may call.

    `parameters` is the JSON schema of its arguments, without which it has none. `strict` refuses schemas that calls cannot be
    held to; every schema that they can be held to is followed anyhow.
    """

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True, frozen=True):
    """A tool the model may call."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionName(Struct, kw_only=True, frozen=True):
    """The name of a function."""

    name: str


class NamedTool(Struct, kw_only=True, frozen=True, tag_field="type", tag="function"):
    """The tool that must be called."""

    function: FunctionName


class AllowedNames(Struct, kw_only=True, frozen=True):
    """Some of the tools; `required` means that one of them must be called."""

    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=128)]
    mode: Literal["auto", "required"] = "auto"


class AllowedTools(Struct, kw_only=True, frozen=True, tag_field="type", tag="allowed_tools"):
    """The tools that may be called."""

    allowed_tools: AllowedNames


class ChatMessage(Struct, kw_only=True, frozen=True):
    """One message of the conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=8192)]


class ChatRequest(ShapedFields, kw_only=True, frozen=True):
    """A conversation to continue."""

    messages: Messages
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionDefinition], Meta(max_length=128)] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Meta(max_length=64)] | None = None


class TopLogprob(Struct, kw_only=True, frozen=True):
    """One alternative at one position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct, kw_only=True, frozen=True):
    """One generated token."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True, frozen=True):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Struct, kw_only=True, frozen=True):
    """The function of a call; the arguments are JSON, cut short where the answer was."""

    name: str
    arguments: str


class AnswerToolCall(Struct, kw_only=True, frozen=True):
    """A call of a tool."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AnswerMessage(Struct, kw_only=True, frozen=True):
    """The assistant's message; without content where it only calls tools."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnswerToolCall] | UnsetType = UNSET
    function_call: CalledFunction | UnsetType = UNSET


FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class ChatChoice(Struct, kw_only=True, frozen=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_gates: list[TokenGate] | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True, frozen=True):
    """The response of a request that did not ask for a stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET


class FunctionDelta(Struct, kw_only=True, frozen=True):
    """More of a call: its name once, and the next piece of its arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct, kw_only=True, frozen=True):
    """More of a call; id and type once."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Struct, kw_only=True, frozen=True):
    """What a chunk adds; the first carries the role, the last is empty."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    function_call: FunctionDelta | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True, frozen=True):
    """The next piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_gates: list[TokenGate] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True, frozen=True):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET
