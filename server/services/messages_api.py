"""Anthropic's Messages API in words of chat completions, and answers back: pure functions and the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from atlas_jax.engine.api import AnswerShape, Delta, Prompt
from server.errors import BadRequest
from server.schemas import messages as schema
from server.schemas.chat import ChatMessage, ChatRequest, FunctionCall, FunctionDefinition, ToolCall
from server.schemas.usage import Usage
from server.services.answer_shape import format_shape
from server.services.response_builder import Ending, FinishReason, Outcome, finish_reason
from server.tool_calls.answer import AnswerReader
from server.tool_calls.choice import CHOICES, Choice, Function, Tools, choose, functions_of
from server.tool_calls.parts import Change, Closed, Grown, Opened, Part, Parts
from server.validation import invalid

_UNSEEN = ("thinking", "redacted_thinking")


# --- requests ---------------------------------------------------------------------------------------------------------
def refuse(body: schema.CountRequest) -> None:
    """Refuses what would change the answer and is not there; raises BadRequest by name."""
    if body.messages[-1].role == "assistant":
        raise invalid(
            f"messages[{len(body.messages) - 1}].role",
            "the last message must be the user's: going on with an answer is not supported",
        )


def chosen_tools(body: schema.CountRequest) -> Tools | None:
    """The tools of a request, as `choose`; raises BadRequest."""
    given = body.tool_choice or schema.AnthropicToolChoice(type="auto")
    if given.type == "tool":
        if given.name is None:
            raise invalid("tool_choice.name", "required field is missing")
        choice = Choice(names=[(given.name, "tool_choice.name")], forced=True, single=True)
    else:
        choice = CHOICES[given.type]
    return choose(
        _functions(body, unused=choice.none), choice, field="tools", parallel=not given.disable_parallel_tool_use
    )


def _functions(body: schema.CountRequest, *, unused: bool) -> tuple[Function, ...]:
    given = []
    for index, one in enumerate(body.tools or ()):
        field = f"tools[{index}]"
        if one.type not in (None, "custom"):
            if unused:
                continue
            raise BadRequest(
                f"Validation error in field '{field}.type': tools of type '{one.type[:64]}' are not supported",
                param=f"{field}.type",
                code="unsupported_tool",
            )
        definition = FunctionDefinition(
            name=one.name, description=one.description, parameters=one.input_schema, strict=one.strict
        )
        given.append((definition, field, f"{field}.input_schema"))
    return functions_of(given)


def answer_shape(body: schema.CountRequest) -> AnswerShape | None:
    """What `output_config.format`, or `output_format` as it was called before, demands; raises BadRequest."""
    newer = None if body.output_config is None else body.output_config.format
    if newer and body.output_format:
        raise invalid("output_format", "cannot be combined with output_config.format")
    given, field = (newer, "output_config.format") if newer else (body.output_format, "output_format")
    if not given:
        return None
    if given.get("type") != "json_schema":
        raise invalid(f"{field}.type", "must be json_schema")
    if not isinstance(given.get("schema"), dict):
        raise invalid(f"{field}.schema", "must be an object")
    return format_shape(given, field)


def conversation(body: schema.CountRequest) -> list[ChatMessage]:
    """The messages of a chat completion."""
    out = [] if body.system is None else [ChatMessage(role="system", content=_texts(body.system, "system"))]
    for index, one in enumerate(body.messages):
        field = f"messages[{index}].content"
        if isinstance(one.content, str):
            out.append(ChatMessage(role=one.role, content=one.content))
        elif one.role == "assistant":
            out.append(_answer(one.content, field))
        else:
            out += _question(one.role, one.content, field)
    return out


def _answer(blocks: Sequence[schema.Block], field: str) -> ChatMessage:
    """What the model has said: thinking, text and uses of tools."""
    thought, texts, calls = "", list[str](), list[ToolCall]()
    for at, block in enumerate(blocks):
        place = f"{field}[{at}]"
        match block.type:
            case "thinking":
                thought += block.thinking or ""
            case "redacted_thinking":
                pass
            case "tool_use":
                name = _given(block.name, f"{place}.name")
                function = FunctionCall(name=name, arguments=_json(_given(block.input, f"{place}.input")))
                calls.append(ToolCall(function=function, id=_given(block.id, f"{place}.id")))
            case _:
                texts.append(_text(block, place))
    return ChatMessage(
        role="assistant", content="\n".join(texts), tool_calls=calls or None, reasoning_content=thought or None
    )


def _json(arguments: dict[str, Any]) -> str:
    """Arguments as chat templates spell them, so that what comes back is what the model wrote."""
    return json.dumps(arguments, ensure_ascii=False)


def _question(role: Any, blocks: Sequence[schema.Block], field: str) -> list[ChatMessage]:
    """What the model is told: results of tools, each a message, and texts."""
    out: list[ChatMessage] = []
    texts: list[str] = []

    def flush() -> None:
        if texts:
            out.append(ChatMessage(role=role, content="\n".join(texts)))
            texts.clear()

    for at, block in enumerate(blocks):
        place = f"{field}[{at}]"
        if block.type != "tool_result":
            if block.type not in _UNSEEN:
                texts.append(_text(block, place))
            continue
        flush()
        result = "" if block.content is None else _texts(block.content, f"{place}.content")
        if block.is_error:
            result = f"Error: {result}"
        out.append(
            ChatMessage(role="tool", content=result, tool_call_id=_given(block.tool_use_id, f"{place}.tool_use_id"))
        )
    flush()
    return out or [ChatMessage(role=role, content="")]


def _given(value: Any, field: str) -> Any:
    if value is None:
        raise invalid(field, "required field is missing")
    return value


def _texts(content: str | Sequence[schema.Block | schema.ResultBlock], field: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text(block, f"{field}[{at}]") for at, block in enumerate(content) if block.type not in _UNSEEN)


def _text(block: schema.Block | schema.ResultBlock, field: str) -> str:
    if block.type != "text":
        raise BadRequest(
            f"Validation error in field '{field}.type': content of type '{block.type[:64]}' is not supported",
            param=f"{field}.type",
            code="unsupported_content_part",
        )
    if block.text is None:
        raise invalid(f"{field}.text", "required field is missing")
    return block.text


def template_variables(body: schema.CountRequest) -> dict[str, Any] | None:
    """Whether and how much the model shall think, as chat templates take it that know of such a thing."""
    out: dict[str, Any] = {}
    if body.thinking is not None and body.thinking.type in ("enabled", "disabled"):
        out["enable_thinking"] = body.thinking.type == "enabled"
    if body.output_config is not None and body.output_config.effort is not None:
        out["reasoning_effort"] = body.output_config.effort
    return out or None


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
        chat_template_kwargs=template_variables(body),
        atlas=body.atlas,
    )


# --- answers ----------------------------------------------------------------------------------------------------------
class MessageBuilder:
    """The message and the events of its stream: a block for every part of an answer.

    Args:
      reader: makes what tells thinking and the use of tools from the rest.
    """

    def __init__(
        self,
        message_id: str,
        *,
        model: str,
        prompt_tokens: int,
        reader: Callable[[], AnswerReader] = AnswerReader,
    ) -> None:
        self._parts = Parts(reader())
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
        return [schema.MessageStart(message=self._message)]

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """Events for new text."""
        return [_event(change) for change in self._parts.push(event.text)] if isinstance(event, Delta) else ()

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """Events that finish the answer."""
        assert ending is not None
        last = [_event(change) for change in self._parts.finish(cut=reason == "length")]
        stop = schema.StopDelta(stop_reason=self._stop_reason(reason, ending), stop_sequence=ending.stop)
        return [
            *last,
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
        reason = finish_reason(outcome.finished)
        self._parts.push(outcome.text)
        self._parts.finish(cut=reason == "length")
        return msgspec.structs.replace(
            self._message,
            content=[_block(part) for part in self._parts.found],
            stop_reason=self._stop_reason(reason, ending),
            stop_sequence=ending.stop,
            usage=_usage(usage),
            timings=ending.timings,
            atlas_stats=ending.atlas_stats,
        )

    def _stop_reason(self, reason: FinishReason, ending: Ending) -> schema.StopReason:
        if reason == "length":
            return "max_tokens"
        if ending.stop is not None:
            return "stop_sequence"
        return "tool_use" if self._parts.called else "end_turn"


def _block(part: Part, *, empty: bool = False) -> schema.AnswerBlock:
    if part.kind == "call":
        return schema.ToolUseBlock(id=part.id, name=part.name, input={} if empty else part.arguments)
    text = "" if empty else part.text
    return schema.ThinkingBlock(thinking=text) if part.kind == "reasoning" else schema.TextBlock(text=text)


def _event(change: Change) -> msgspec.Struct:
    part = change.part
    match change:
        case Opened():
            return schema.ContentBlockStart(index=part.index, content_block=_block(part, empty=True))
        case Closed():
            return schema.ContentBlockStop(index=part.index)
        case Grown(_, text):
            delta: schema.TextDelta | schema.ThinkingDelta | schema.InputJsonDelta
            if part.kind == "call":
                delta = schema.InputJsonDelta(partial_json=text)
            elif part.kind == "reasoning":
                delta = schema.ThinkingDelta(thinking=text)
            else:
                delta = schema.TextDelta(text=text)
            return schema.ContentBlockDelta(index=part.index, delta=delta)


def _usage(usage: Usage) -> schema.MessageUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return schema.MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=cached,
    )
