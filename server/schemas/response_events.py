"""The events of a streamed response."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from server.schemas.chat import TokenLogprob
from server.schemas.responses import OutputItem, OutputText, ReasoningText, ResponseObject, SummaryText


class ResponseEvent(Struct, kw_only=True, frozen=True):
    """The response begins, or has come to its end."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: ResponseObject


class OutputItemEvent(Struct, kw_only=True, frozen=True):
    """An item of the answer begins, or has come to its end."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class ContentPartEvent(Struct, kw_only=True, frozen=True):
    """An item's text begins, or has come to its end."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText


class SummaryPartEvent(Struct, kw_only=True, frozen=True):
    """The summary of reasoning begins, or has come to its end."""

    type: Literal["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    summary_index: int
    part: SummaryText


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


class ReasoningDeltaEvent(Struct, kw_only=True, frozen=True):
    """More of what the model thinks."""

    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"


class ReasoningDoneEvent(Struct, kw_only=True, frozen=True):
    """All that the model has thought."""

    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"


class SummaryDeltaEvent(Struct, kw_only=True, frozen=True):
    """More of what the model thinks, where a summary was asked for."""

    sequence_number: int
    item_id: str
    output_index: int
    summary_index: int
    delta: str
    type: Literal["response.reasoning_summary_text.delta"] = "response.reasoning_summary_text.delta"


class SummaryDoneEvent(Struct, kw_only=True, frozen=True):
    """All that the model has thought, where a summary was asked for."""

    sequence_number: int
    item_id: str
    output_index: int
    summary_index: int
    text: str
    type: Literal["response.reasoning_summary_text.done"] = "response.reasoning_summary_text.done"


class ArgumentsDeltaEvent(Struct, kw_only=True, frozen=True):
    """More of a call's arguments."""

    sequence_number: int
    item_id: str
    output_index: int
    delta: str
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"


class ArgumentsDoneEvent(Struct, kw_only=True, frozen=True):
    """All of a call's arguments."""

    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
