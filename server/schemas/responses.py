"""`/v1/responses`: request, response, the events of a stream, and the lists and deletions around them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from server.schemas.atlas import AtlasStats
from server.schemas.chat import ContentPart, TokenLogprob
from server.schemas.sampling import SamplingFields
from server.schemas.usage import Timings

Name = Annotated[str, Meta(min_length=1, max_length=128)]


class InputItem(Struct, kw_only=True, frozen=True):
    """One item of the input: a message."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    id: str | None = None


class ConversationRef(Struct, kw_only=True, frozen=True):
    """A conversation by its name."""

    id: Name


class TextConfig(Struct, kw_only=True, frozen=True):
    """What the answer's text must look like; `verbosity` is a hint."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(SamplingFields, kw_only=True, frozen=True):
    """What is new, and which response or conversation it follows."""

    input: str | Annotated[list[InputItem], Meta(max_length=8192)] | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    conversation: Name | ConversationRef | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    metadata: (
        Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
        | None
    ) = None
    text: TextConfig | None = None
    include: Annotated[list[str], Meta(max_length=32)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# --- the response -----------------------------------------------------------------------------------------------------
class OutputText(Struct, kw_only=True, frozen=True):
    """A part of an answer."""

    text: str
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(Struct, kw_only=True, frozen=True):
    """An answer."""

    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class InputTokensDetails(Struct, kw_only=True, frozen=True):
    """`cached_tokens` did not have to be processed again."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, kw_only=True, frozen=True):
    """None of the tokens are hidden ones."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, kw_only=True, frozen=True):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct, kw_only=True, frozen=True):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Struct, kw_only=True, frozen=True):
    """Why an answer has not come to its end."""

    reason: Literal["max_output_tokens"]


class ResponseObject(Struct, kw_only=True, frozen=True):
    """A response; `output` is empty until it is complete."""

    id: str
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage]
    temperature: float | None
    top_p: float | None
    text: dict[str, Any]
    store: bool
    object: Literal["response"] = "response"
    background: Literal[False] = False
    completed_at: float | None = None
    conversation: ConversationRef | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] = msgspec.field(default_factory=lambda: {"effort": None, "summary": None})
    safety_identifier: str | None = None
    service_tier: Literal["default"] = "default"
    tool_choice: Literal["auto", "none"] = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0
    truncation: Literal["auto", "disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    timings: Timings | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET


# --- events -----------------------------------------------------------------------------------------------------------
class ResponseEvent(Struct, kw_only=True, frozen=True):
    """The response begins, or has come to its end."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: ResponseObject


class OutputItemEvent(Struct, kw_only=True, frozen=True):
    """The answer begins, or has come to its end."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputMessage


class ContentPartEvent(Struct, kw_only=True, frozen=True):
    """The answer's text begins, or has come to its end."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class TextDeltaEvent(Struct, kw_only=True, frozen=True):
    """New text."""

    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]
    type: Literal["response.output_text.delta"] = "response.output_text.delta"


class TextDoneEvent(Struct, kw_only=True, frozen=True):
    """All the text."""

    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[TokenLogprob]
    type: Literal["response.output_text.done"] = "response.output_text.done"


ResponseStreamEvent = ResponseEvent | OutputItemEvent | ContentPartEvent | TextDeltaEvent | TextDoneEvent


# --- what is kept -----------------------------------------------------------------------------------------------------
class StoredPart(Struct, kw_only=True, frozen=True):
    """Text of an item."""

    type: Literal["input_text", "output_text"]
    text: str


class StoredItem(Struct, kw_only=True, frozen=True):
    """An item of a response's input."""

    id: str
    role: Literal["user", "assistant", "system", "developer"]
    content: list[StoredPart]
    type: Literal["message"] = "message"
    status: Literal["completed"] = "completed"


class ItemList(Struct, kw_only=True, frozen=True):
    """One page of items."""

    data: list[StoredItem]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class DeletedResponse(Struct, kw_only=True, frozen=True):
    """What became of a response."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class InputTokens(Struct, kw_only=True, frozen=True):
    """How many tokens a request would read."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"
