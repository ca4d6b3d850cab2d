"""Anthropic's Messages API in words of chat completions, and answers back: pure functions and the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from atlas_jax.engine.api import Delta, Prompt
from server.errors import BadRequest
from server.schemas import messages as schema
from server.schemas.chat import ChatMessage, ChatRequest
from server.schemas.usage import Usage
from server.services.response_builder import Ending, FinishReason, Outcome, finish_reason
from server.validation import invalid, unsupported

_UNSEEN = ("thinking", "redacted_thinking")


# --- requests ---------------------------------------------------------------------------------------------------------
def refuse(body: schema.CountRequest) -> None:
    """Refuses what would change the answer and is not there; raises BadRequest by name."""
    if body.tools and (body.tool_choice or {}).get("type") != "none":
        raise unsupported("tools")
    if body.tool_choice and body.tool_choice.get("type") not in ("auto", "none"):
        raise unsupported("tool_choice")
    if body.thinking and body.thinking.get("type") != "disabled":
        raise unsupported("thinking")
    if body.messages[-1].role == "assistant":
        raise invalid(
            f"messages[{len(body.messages) - 1}].role",
            "the last message must be the user's: going on with an answer is not supported",
        )


def conversation(body: schema.CountRequest) -> list[ChatMessage]:
    """The messages of a chat completion."""
    out = [] if body.system is None else [ChatMessage(role="system", content=_text(body.system, "system"))]
    for index, one in enumerate(body.messages):
        out.append(ChatMessage(role=one.role, content=_text(one.content, f"messages[{index}].content")))
    return out


def _text(content: str | list[schema.Block], field: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_block(block, f"{field}[{at}]") for at, block in enumerate(content) if block.type not in _UNSEEN)


def _block(block: schema.Block, field: str) -> str:
    if block.type != "text":
        raise BadRequest(
            f"Validation error in field '{field}.type': content of type '{block.type[:64]}' is not supported",
            param=f"{field}.type",
            code="unsupported_content_part",
        )
    if block.text is None:
        raise invalid(f"{field}.text", "required field is missing")
    return block.text


def chat_request(body: schema.MessagesRequest) -> ChatRequest:
    """The same request as a chat completion."""
    return ChatRequest(
        messages=conversation(body),
        model=body.model,
        max_completion_tokens=body.max_tokens,
        stop=body.stop_sequences,
        stream=body.stream,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        atlas=body.atlas,
    )


# --- answers ----------------------------------------------------------------------------------------------------------
class MessageBuilder:
    """The message and the events of its stream."""

    def __init__(self, message_id: str, *, model: str, prompt_tokens: int) -> None:
        self._message = schema.Message(
            id=message_id,
            model=model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=schema.MessageUsage(input_tokens=prompt_tokens, output_tokens=0),
        )

    def opening(self) -> Sequence[msgspec.Struct]:
        """What a stream begins with."""
        return [
            schema.MessageStart(message=self._message),
            schema.ContentBlockStart(index=0, content_block=schema.TextBlock(text="")),
        ]

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """Events for new text."""
        if not isinstance(event, Delta) or not event.text:
            return ()
        return [schema.ContentBlockDelta(index=0, delta=schema.TextDelta(text=event.text))]

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """Events that finish the answer."""
        assert ending is not None
        stop = schema.StopDelta(stop_reason=_stop_reason(reason, ending), stop_sequence=ending.stop)
        return [
            schema.ContentBlockStop(index=0),
            schema.MessageDelta(
                delta=stop, usage=_usage(ending.usage), timings=ending.timings, atlas_stats=ending.atlas_stats
            ),
            schema.MessageStop(),
        ]

    def usage(self, usage: Usage) -> msgspec.Struct:
        """Never asked for: counts are in the last events."""
        raise AssertionError("messages have no chunk of usage")

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        """The message."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        return msgspec.structs.replace(
            self._message,
            content=[schema.TextBlock(text="".join(outcome.text))],
            stop_reason=_stop_reason(finish_reason(outcome.finished), ending),
            stop_sequence=ending.stop,
            usage=_usage(usage),
            timings=ending.timings,
            atlas_stats=ending.atlas_stats,
        )


def _stop_reason(reason: FinishReason, ending: Ending) -> schema.StopReason:
    if reason == "length":
        return "max_tokens"
    return "end_turn" if ending.stop is None else "stop_sequence"


def _usage(usage: Usage) -> schema.MessageUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return schema.MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=cached,
    )
