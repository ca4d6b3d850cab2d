"""`/v1/responses`: request, items, response, and the lists and deletions around them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from server.schemas.atlas import AtlasStats
from server.schemas.chat import ContentPart, TokenLogprob
from server.schemas.sampling import SamplingFields
from server.schemas.usage import Timings

Name = Annotated[str, Meta(min_length=1, max_length=128)]


class InputItem(Struct, kw_only=True, frozen=True):
    """One item of the input: a message, a call of a function and what it returned, or reasoning.

    Which of the fields there are depends on the type.
    """

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    id: str | None = None
    call_id: Annotated[str, Meta(max_length=256)] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None


InputItems = Annotated[list[InputItem], Meta(max_length=8192)]


class ConversationRef(Struct, kw_only=True, frozen=True):
    """A conversation by its name."""

    id: Name


class TextConfig(Struct, kw_only=True, frozen=True):
    """What the answer's text must look like; `verbosity` is a hint."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class NamespacedTool(Struct, kw_only=True, frozen=True):
    """A function in a namespace."""

    type: str
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Struct, kw_only=True, frozen=True):
    """A function the model may call, or a namespace of some; the fields are those of a function in chat completions."""

    type: str
    tools: Annotated[list[NamespacedTool], Meta(max_length=128)] | UnsetType | None = UNSET
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Struct, kw_only=True, frozen=True, tag_field="type", tag="function"):
    """The function that must be called."""

    name: str


class AllowedFunctions(Struct, kw_only=True, frozen=True, tag_field="type", tag="allowed_tools"):
    """The functions that may be called; `required` means that one of them must be."""

    tools: Annotated[list[NamedFunction], Meta(min_length=1, max_length=128)]
    mode: Literal["auto", "required"] = "auto"


ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class ReasoningOptions(Struct, kw_only=True, frozen=True):
    """Hints for the model's template, and whether its reasoning is wanted as a summary."""

    effort: Annotated[str, Meta(max_length=64)] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(SamplingFields, kw_only=True, frozen=True):
    """What is new, and which response or conversation it follows."""

    input: str | InputItems | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    conversation: Name | ConversationRef | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    metadata: Metadata | None = None
    text: TextConfig | None = None
    include: Annotated[list[str], Meta(max_length=32)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# --- items -------------------------------------------------------------------------------------------------------------
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Struct, kw_only=True, frozen=True, tag_field="type", tag="input_text"):
    """A part of a message to the model."""

    text: str


class OutputText(Struct, kw_only=True, frozen=True, tag_field="type", tag="output_text"):
    """A part of an answer."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(Struct, kw_only=True, frozen=True, tag_field="type", tag="reasoning_text"):
    """What the model has thought."""

    text: str


class SummaryText(Struct, kw_only=True, frozen=True, tag_field="type", tag="summary_text"):
    """The same, where a summary was asked for."""

    text: str


class MessageItem(Struct, kw_only=True, frozen=True, tag_field="type", tag="message"):
    """A message to the model, or its answer."""

    id: str
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputText | OutputText]
    status: ItemStatus = "completed"


class FunctionCallItem(Struct, kw_only=True, frozen=True, tag_field="type", tag="function_call"):
    """A call of a function; the arguments are JSON, cut short where the answer was."""

    id: str
    call_id: str
    name: str
    arguments: str
    namespace: str | UnsetType = UNSET
    status: ItemStatus = "completed"


class FunctionOutputItem(Struct, kw_only=True, frozen=True, tag_field="type", tag="function_call_output"):
    """What a function has returned."""

    id: str
    call_id: str
    output: str | list[InputText]
    status: ItemStatus = "completed"


class ReasoningItem(Struct, kw_only=True, frozen=True, tag_field="type", tag="reasoning"):
    """What the model has thought before an answer."""

    id: str
    summary: list[SummaryText]
    content: list[ReasoningText]
    status: ItemStatus = "completed"


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem
OutputItem = MessageItem | FunctionCallItem | ReasoningItem


# --- the response -----------------------------------------------------------------------------------------------------
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


class ReasoningEcho(Struct, kw_only=True, frozen=True):
    """What was said of reasoning."""

    effort: str | None = None
    summary: str | None = None


class ResponseObject(Struct, kw_only=True, frozen=True):
    """A response; `output` is empty until it is complete."""

    id: str
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputItem]
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
    max_tool_calls: int | None = None
    reasoning: ReasoningEcho = ReasoningEcho()
    safety_identifier: str | None = None
    service_tier: Literal["default"] = "default"
    tool_choice: ToolChoice = "auto"
    tools: list[FunctionTool] = []
    top_logprobs: int = 0
    truncation: Literal["auto", "disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    timings: Timings | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET


# --- what is kept -----------------------------------------------------------------------------------------------------
class ItemList(Struct, kw_only=True, frozen=True):
    """One page of items."""

    data: list[Item]
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
