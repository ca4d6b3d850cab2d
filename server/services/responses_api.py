"""OpenAI's Responses API in words of chat completions, and answers back: pure functions and the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from atlas_jax.engine.api import Delta, Prompt, TokenInfo
from server.errors import BadRequest, Problem
from server.schemas import responses as schema
from server.schemas.chat import ChatMessage, ChatRequest, ContentPart
from server.schemas.usage import Usage
from server.services.chat_response import token_logprobs
from server.services.response_builder import Ending, FinishReason, Outcome, finish_reason, new_id
from server.services.response_store import Record
from server.validation import invalid, unsupported

RESPONSE = "resp"
"""How ids of responses begin, and the sessions that belong to them."""
LOGPROBS = "message.output_text.logprobs"
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("text", "input_text", "output_text")
_FORMATS = ("text", "json_object", "json_schema")
# What a request may share with a chat completion, as it is.
_SHARED = (
    *("model", "temperature", "top_p", "top_k", "min_p", "typical_p", "repeat_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "seed", "stop", "stream", "ignore_eos", "cache_prompt", "user"),
)


# --- requests ---------------------------------------------------------------------------------------------------------
def refuse(body: schema.ResponsesRequest) -> None:
    """Refuses what would change the answer and is not there; raises BadRequest by name."""
    if body.tools and body.tool_choice != "none":
        raise unsupported("tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice")
    if body.background:
        raise unsupported("background")
    for name in ("max_tokens", "n_predict"):
        if getattr(body, name) is not None:
            raise invalid(name, "unknown field; did you mean 'max_output_tokens'?", code="unknown_field")
    if body.n not in (None, 1):
        raise unsupported("n")
    if body.previous_response_id is not None and body.conversation is not None:
        raise invalid("previous_response_id", "cannot be combined with conversation")
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise invalid("top_logprobs", f"needs '{LOGPROBS}' in include")


def input_items(given: str | Sequence[schema.InputItem] | None) -> list[schema.StoredItem]:
    """The items of a request's input as they are kept; raises BadRequest."""
    if given is None:
        raise invalid("input", "required field is missing")
    if isinstance(given, str):
        given = [schema.InputItem(role="user", content=given)]
    out = []
    for index, item in enumerate(given):
        field = f"input[{index}]"
        if item.type == "reasoning":  # a hint, of models that think aloud
            continue
        if item.type != "message":
            raise BadRequest(
                f"Items of type '{item.type[:64]}' are not supported", param=f"{field}.type", code="unsupported_item"
            )
        if item.role not in _ROLES:
            raise invalid(f"{field}.role", f"value must be one of {', '.join(_ROLES)}")
        if item.content is None:
            raise invalid(f"{field}.content", "required field is missing")
        kind: Literal["input_text", "output_text"] = "output_text" if item.role == "assistant" else "input_text"
        parts = [item.content] if isinstance(item.content, str) else _texts(item.content, f"{field}.content")
        out.append(
            schema.StoredItem(
                id=new_id("msg"),
                role=item.role,  # type: ignore[arg-type]
                content=[schema.StoredPart(type=kind, text=text) for text in parts],
            )
        )
    if not out:
        raise invalid("input", "must have at least one message")
    return out


def _texts(parts: Sequence[ContentPart], field: str) -> list[str]:
    out = []
    for at, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*_TEXTS, "refusal"):
            raise BadRequest(
                f"Content parts of type '{part.type[:64]}' are not supported",
                param=f"{field}[{at}].type",
                code="unsupported_content_part",
            )
        if text is None:
            raise invalid(
                f"{field}[{at}].{'refusal' if part.type == 'refusal' else 'text'}", "required field is missing"
            )
        out.append(text)
    return out


def messages(
    instructions: str | None, before: Sequence[Record], items: Sequence[schema.StoredItem]
) -> list[ChatMessage]:
    """The whole conversation: what came before, question by answer, and what is new; instructions are of this request."""
    out = [] if instructions is None else [ChatMessage(role="system", content=instructions)]
    for record in before:
        out += map(_message, record.input)
        out.append(ChatMessage(role="assistant", content=record.answer))
    return [*out, *map(_message, items)]


def _message(item: schema.StoredItem) -> ChatMessage:
    return ChatMessage(role=item.role, content="\n".join(part.text for part in item.content))


def chat_request(body: schema.ResponsesRequest, conversation: list[ChatMessage], atlas: Any) -> ChatRequest:
    """The same request as a chat completion."""
    wants = LOGPROBS in (body.include or ())
    return ChatRequest(
        messages=conversation,
        max_completion_tokens=body.max_output_tokens,
        logprobs=wants,
        top_logprobs=body.top_logprobs if wants else None,
        response_format=_response_format(None if body.text is None else body.text.format),
        atlas=atlas,
        **{name: getattr(body, name) for name in _SHARED},
    )


def _response_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not given:
        return None
    kind = given.get("type")
    if kind not in _FORMATS:
        raise invalid("text.format.type", f"must be one of {', '.join(_FORMATS)}")
    if kind != "json_schema":
        return {"type": kind}
    if not isinstance(given.get("schema"), dict):
        raise invalid("text.format.schema", "must be an object")
    return {"type": kind, "json_schema": {"name": given.get("name", ""), "schema": given["schema"]}}


# --- answers ----------------------------------------------------------------------------------------------------------
class ResponsesBuilder:
    """The response object and the events of its stream.

    Attributes:
      response: as it is now; complete once `end` or `whole` has been called.
      text: of the answer so far.
    """

    def __init__(self, response: schema.ResponseObject, *, logprobs: bool) -> None:
        self.response = response
        self._item = new_id("msg")
        self._wants = logprobs
        self._text: list[str] = []
        self._logprobs: list[Any] = []
        self._sequence = -1

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._text)

    def opening(self) -> Sequence[msgspec.Struct]:
        """What a stream begins with."""
        return [
            schema.ResponseEvent(type="response.created", sequence_number=self._next(), response=self.response),
            schema.ResponseEvent(type="response.in_progress", sequence_number=self._next(), response=self.response),
            schema.OutputItemEvent(
                type="response.output_item.added",
                sequence_number=self._next(),
                output_index=0,
                item=schema.OutputMessage(id=self._item, status="in_progress", content=[]),
            ),
            self._part("response.content_part.added", schema.OutputText(text="")),
        ]

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """Events for new text."""
        if not isinstance(event, Delta) or not (event.text or event.tokens):
            return ()
        logprobs = self._add(event.text, event.tokens)
        return [
            schema.TextDeltaEvent(
                sequence_number=self._next(),
                item_id=self._item,
                output_index=0,
                content_index=0,
                delta=event.text,
                logprobs=logprobs,
            )
        ]

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """Events that finish the answer."""
        assert ending is not None
        self._finish(reason, ending)
        (item,) = self.response.output
        (part,) = item.content
        return [
            schema.TextDoneEvent(
                sequence_number=self._next(),
                item_id=self._item,
                output_index=0,
                content_index=0,
                text=part.text,
                logprobs=part.logprobs,
            ),
            self._part("response.content_part.done", part),
            schema.OutputItemEvent(
                type="response.output_item.done", sequence_number=self._next(), output_index=0, item=item
            ),
            schema.ResponseEvent(
                type="response.incomplete" if self.response.status == "incomplete" else "response.completed",
                sequence_number=self._next(),
                response=self.response,
            ),
        ]

    def usage(self, usage: Usage) -> msgspec.Struct:
        """Never asked for: counts are in the response."""
        raise AssertionError("responses have no chunk of usage")

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        """The response."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        self._add("".join(outcome.text), outcome.tokens)
        self._finish(finish_reason(outcome.finished), ending)
        return self.response

    def failed(self, found: Problem) -> msgspec.Struct:
        """The event a stream ends with that has failed."""
        code = "rate_limit_exceeded" if found.status == 429 else "server_error"
        failed = msgspec.structs.replace(
            self.response, status="failed", output=[], error=schema.ResponseError(code=code, message=found.message)
        )
        return schema.ResponseEvent(type="response.failed", sequence_number=self._next(), response=failed)

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _part(
        self, kind: Literal["response.content_part.added", "response.content_part.done"], part: schema.OutputText
    ) -> msgspec.Struct:
        return schema.ContentPartEvent(
            type=kind,
            sequence_number=self._next(),
            item_id=self._item,
            output_index=0,
            content_index=0,
            part=part,
        )

    def _add(self, text: str, tokens: Sequence[TokenInfo]) -> list[Any]:
        self._text.append(text)
        found = token_logprobs(tokens) if self._wants else []
        self._logprobs += found
        return found

    def _finish(self, reason: FinishReason, ending: Ending) -> None:
        cut = reason == "length"
        usage = ending.usage
        part = schema.OutputText(text=self.text, logprobs=self._logprobs)
        status: Literal["incomplete", "completed"] = "incomplete" if cut else "completed"
        self.response = msgspec.structs.replace(
            self.response,
            status=status,
            completed_at=None if cut else time.time(),
            incomplete_details=schema.IncompleteDetails(reason="max_output_tokens") if cut else None,
            output=[schema.OutputMessage(id=self._item, status=status, content=[part])],
            usage=schema.ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=schema.InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=schema.OutputTokensDetails(),
                total_tokens=usage.total_tokens,
            ),
            timings=ending.timings,
            atlas_stats=ending.atlas_stats,
        )


def begun(
    body: schema.ResponsesRequest, *, response_id: str, model: str, temperature: float, top_p: float, store: bool
) -> schema.ResponseObject:
    """The response of a request that has just been accepted."""
    conversation = body.conversation
    return schema.ResponseObject(
        id=response_id,
        created_at=float(int(time.time())),
        status="in_progress",
        model=model,
        output=[],
        temperature=temperature,
        top_p=top_p,
        text={"format": (body.text.format if body.text is not None else None) or {"type": "text"}},
        store=store,
        conversation=schema.ConversationRef(id=conversation) if isinstance(conversation, str) else conversation,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        safety_identifier=body.safety_identifier,
        tool_choice="none" if body.tool_choice == "none" else "auto",
        top_logprobs=body.top_logprobs or 0,
        truncation=body.truncation or "disabled",
        user=body.user,
    )
