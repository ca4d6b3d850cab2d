"""Ollama's API in words of OpenAI's, and answers back: pure functions and the lines of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from atlas_jax.engine.api import AnswerShape, Delta, ModelInfo, Prompt
from server.closed_schema import closed
from server.schemas import ollama as schema
from server.schemas.chat import ChatMessage, ChatRequest, FunctionCall, ToolCall
from server.schemas.completions import CompletionRequest
from server.schemas.usage import Usage
from server.services.response_builder import Ending, FinishReason, Outcome, finish_reason
from server.tool_calls.answer import AnswerReader
from server.tool_calls.choice import Choice, Tools, choose, functions_of_tools
from server.tool_calls.parts import Change, Closed, Grown, Part, Parts
from server.validation import invalid, unsupported

LATEST = ":latest"
"""What Ollama's clients put after a name that has no tag."""
_SAME = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty")


# --- requests ---------------------------------------------------------------------------------------------------------
def refuse(body: schema.OllamaChatRequest | schema.OllamaGenerateRequest) -> None:
    """Refuses what would change the answer and is not there; raises BadRequest by name."""
    for name in ("images", "template", "context", "logprobs"):
        if getattr(body, name, None):
            raise unsupported(name)
    for index, message in enumerate(getattr(body, "messages", None) or ()):
        if message.images:
            raise unsupported(f"messages[{index}].images")
    if body.format is not None and body.format not in ("", "json") and not isinstance(body.format, dict):
        raise invalid("format", "must be 'json' or a JSON schema")


def answer_shape(body: schema.OllamaChatRequest | schema.OllamaGenerateRequest) -> AnswerShape | None:
    """What `format` demands."""
    if not body.format:
        return None
    return AnswerShape(
        wanted=closed(body.format) if isinstance(body.format, dict) else {"type": "object"}, field="format"
    )


def chosen_tools(body: schema.OllamaChatRequest) -> Tools | None:
    """The tools of a chat, which the model may call or not; raises BadRequest."""
    return choose(functions_of_tools(body.tools or ()), Choice(), field="tools")


def check_thinking(body: schema.OllamaChatRequest | schema.OllamaGenerateRequest, *, thinks: bool) -> None:
    """Raises BadRequest where a model is asked to think that does not."""
    if body.think and not thinks:
        raise invalid("think", "this model does not think before it answers", code="unsupported_parameter")


def chat_request(body: schema.OllamaChatRequest | schema.OllamaGenerateRequest) -> ChatRequest:
    """The same request as a chat completion; a question is a conversation of one message."""
    if isinstance(body, schema.OllamaChatRequest):
        messages = _messages(body.messages or ())
    else:
        messages = [] if not body.system else [ChatMessage(role="system", content=body.system)]
        messages.append(ChatMessage(role="user", content=body.prompt))
    limit, shared = _shared(body)
    variables: dict[str, Any] | None = None
    if body.think is not None:
        variables = {"enable_thinking": bool(body.think)}
        if isinstance(body.think, str):
            variables["reasoning_effort"] = body.think
    return ChatRequest(messages=messages, max_completion_tokens=limit, chat_template_kwargs=variables, **shared)


def _messages(given: Sequence[schema.OllamaMessage]) -> list[ChatMessage]:
    """The messages of a chat completion. Results stand in the order of the calls they belong to, or name their tools."""
    out: list[ChatMessage] = []
    open_calls: list[tuple[str, str]] = []  # ids and names of calls without a result
    for index, one in enumerate(given):
        calls = [
            ToolCall(
                id=call.id or f"call_{index}_{at}",
                function=FunctionCall(
                    name=call.function.name, arguments=json.dumps(call.function.arguments, ensure_ascii=False)
                ),
            )
            for at, call in enumerate(one.tool_calls or ())
        ]
        result_of = one.tool_call_id
        if one.role == "tool":
            name = one.tool_name or (open_calls[0][1] if open_calls else None)
            found = next((call for call in open_calls if call[1] == name or call[0] == result_of), None)
            if found is not None:
                open_calls.remove(found)
                result_of = result_of or found[0]
        open_calls += [(call.id or "", call.function.name) for call in calls]
        out.append(
            ChatMessage(
                role=one.role,
                content=one.content or "",
                name=one.tool_name,
                tool_calls=calls or None,
                tool_call_id=result_of,
                reasoning_content=one.thinking or None,
            )
        )
    return out


def completion_request(body: schema.OllamaGenerateRequest) -> CompletionRequest:
    """A raw prompt, or one before a gap, as a completion."""
    if body.system:
        raise invalid("system", f"cannot be combined with {'raw' if body.raw else 'suffix'}")
    limit, shared = _shared(body)
    return CompletionRequest(
        prompt=body.prompt,
        suffix=body.suffix,
        max_tokens=-1 if limit is None else limit,
        json_schema={"type": "object"} if body.format == "json" else body.format or None,
        **shared,
    )


def _shared(body: schema.OllamaChatRequest | schema.OllamaGenerateRequest) -> tuple[int | None, dict[str, Any]]:
    options = body.options or schema.OllamaOptions()
    limit = options.num_predict
    return None if limit is None or limit < 0 else limit, {
        **{name: getattr(options, name) for name in (*_SAME, "frequency_penalty", "seed", "stop")},
        "model": plain_name(body.model),
        "stream": body.stream is not False,
        "atlas": body.atlas,
    }


def plain_name(name: str) -> str:
    """A model's name without the tag that means nothing."""
    return name.removesuffix(LATEST)


# --- answers ----------------------------------------------------------------------------------------------------------
class OllamaBuilder:
    """Lines of `/api/chat` or `/api/generate`.

    Calls come out when they are whole, with their arguments as an object; one that was cut short does not.

    Args:
      reader: makes what tells thinking and calls from the rest.
    """

    def __init__(
        self, kind: Literal["chat", "generate"], model: str, *, reader: Callable[[], AnswerReader] = AnswerReader
    ) -> None:
        self._model, self._began, self._kind = model + LATEST, time.perf_counter(), kind
        self._parts = Parts(reader())
        self._called = 0

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """Lines of new text, thinking and calls."""
        return self._lines(self._parts.push(event.text)) if isinstance(event, Delta) else ()

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """The last line, and what comes before it."""
        assert ending is not None
        return [*self._lines(self._parts.finish(cut=reason == "length")), self._last(reason, ending)]

    def usage(self, usage: Usage) -> msgspec.Struct:
        """Never asked for: counts are in the last line."""
        raise AssertionError("there is no line of usage")

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        """The whole answer."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        reason = finish_reason(outcome.finished)
        self._parts.push(outcome.text)
        self._parts.finish(cut=reason == "length")
        found = self._parts.found
        return self._last(
            reason,
            ending,
            text="".join(part.text for part in found if part.kind == "text"),
            thinking="".join(part.text for part in found if part.kind == "reasoning"),
            calls=[self._call(part) for part in found if part.kind == "call" and part.whole],
        )

    def loaded(self) -> msgspec.Struct:
        """The answer to a request without a prompt, which only loads the model."""
        return self._made(done=True, done_reason="load")

    def _lines(self, changes: Sequence[Change]) -> list[msgspec.Struct]:
        out = []
        for change in changes:
            part = change.part
            match change:
                case Grown(_, text) if part.kind == "text":
                    out.append(self._made(text=text, done=False))
                case Grown(_, text) if part.kind == "reasoning":
                    out.append(self._made(thinking=text, done=False))
                case Closed() if part.kind == "call" and part.whole:
                    out.append(self._made(calls=[self._call(part)], done=False))
        return out

    def _call(self, part: Part) -> schema.OllamaCalled:
        self._called += 1
        function = schema.OllamaCalledFunction(index=self._called - 1, name=part.name, arguments=part.arguments)
        return schema.OllamaCalled(id=part.id, function=function)

    def _last(self, reason: FinishReason, ending: Ending, **said: Any) -> msgspec.Struct:
        return self._made(
            **said,
            done=True,
            done_reason=reason,
            total_duration=int((time.perf_counter() - self._began) * 1e9),
            load_duration=0,
            prompt_eval_count=ending.usage.prompt_tokens,
            prompt_eval_duration=int(ending.timings.prompt_ms * 1e6),
            eval_count=ending.usage.completion_tokens,
            eval_duration=int(ending.timings.predicted_ms * 1e6),
            atlas_stats=ending.atlas_stats,
        )

    def _made(
        self, *, text: str = "", thinking: str = "", calls: Sequence[schema.OllamaCalled] = (), **more: Any
    ) -> msgspec.Struct:
        made = {"model": self._model, "created_at": timestamp(time.time()), **more}
        if self._kind == "generate":
            return schema.OllamaGenerated(response=text, thinking=thinking or UNSET, **made)
        message = schema.OllamaAnswer(
            content=text, thinking=thinking or UNSET, tool_calls=list(calls) if calls else UNSET
        )
        return schema.OllamaChat(message=message, **made)


# --- models -----------------------------------------------------------------------------------------------------------
def timestamp(seconds: float) -> str:
    """Unix seconds as Ollama writes a time."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def details(model: ModelInfo) -> schema.OllamaDetails:
    """Facts of the model."""
    size = model.parameters
    unit, scale = next(
        ((unit, scale) for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)) if size >= scale), ("", 1)
    )
    return schema.OllamaDetails(
        family=model.architecture,
        families=[model.architecture],
        parameter_size=f"{size / scale:.4g}{unit}",
        quantization_level="unknown",
    )


def described(name: str, model: ModelInfo, **more: Any) -> schema.OllamaModel:
    """The model under one of its names."""
    return schema.OllamaModel(
        name=name + LATEST,
        model=name + LATEST,
        size=model.size_bytes,
        digest=model.fingerprint,
        details=details(model),
        **more,
    )


def shown(model: ModelInfo, *, thinks: bool) -> schema.OllamaShown:
    """The model, described."""
    architecture = model.architecture
    return schema.OllamaShown(
        details=details(model),
        model_info={
            "general.architecture": architecture,
            "general.parameter_count": model.parameters,
            f"{architecture}.context_length": model.context_length,
            f"{architecture}.embedding_length": model.embedding_size,
            f"{architecture}.block_count": model.layers,
            f"{architecture}.vocab_size": model.vocab_size,
        },
        capabilities=[
            *("completion", "tools"),
            *(["thinking"] if thinks else []),
            *(["insert"] if model.infill is not None else []),
            *(["embedding"] if model.pooling is not None else []),
        ],
        modified_at=timestamp(model.created),
    )
