"""Ollama's API in words of OpenAI's, and answers back: pure functions and the lines of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from atlas_jax.engine.api import Delta, ModelInfo, Prompt
from server.schemas import ollama as schema
from server.schemas.chat import ChatMessage, ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.usage import Usage
from server.services.response_builder import Ending, FinishReason, Outcome, finish_reason
from server.validation import invalid, unsupported

LATEST = ":latest"
"""What Ollama's clients put after a name that has no tag."""
_SAME = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty")
_LINES = {"chat": schema.OllamaChat, "generate": schema.OllamaGenerated}


# --- requests ---------------------------------------------------------------------------------------------------------
def refuse(body: schema.OllamaChatRequest | schema.OllamaGenerateRequest) -> None:
    """Refuses what would change the answer and is not there; raises BadRequest by name."""
    for name in ("tools", "images", "suffix", "template", "context", "logprobs", "think"):
        if getattr(body, name, None):
            raise unsupported(name)
    for index, message in enumerate(getattr(body, "messages", None) or ()):
        for name in ("images", "tool_calls"):
            if getattr(message, name):
                raise unsupported(f"messages[{index}].{name}")
    if body.format is not None and body.format not in ("", "json") and not isinstance(body.format, dict):
        raise invalid("format", "must be 'json' or a JSON schema")


def chat_request(body: schema.OllamaChatRequest | schema.OllamaGenerateRequest) -> ChatRequest:
    """The same request as a chat completion; a question is a conversation of one message."""
    if isinstance(body, schema.OllamaChatRequest):
        messages = [ChatMessage(role=one.role, content=one.content) for one in body.messages or ()]
    else:
        messages = [] if not body.system else [ChatMessage(role="system", content=body.system)]
        messages.append(ChatMessage(role="user", content=body.prompt))
    limit, shared = _shared(body)
    return ChatRequest(messages=messages, max_completion_tokens=limit, response_format=_format(body.format), **shared)


def completion_request(body: schema.OllamaGenerateRequest) -> CompletionRequest:
    """A raw prompt as a completion."""
    if body.system:
        raise invalid("system", "cannot be combined with raw")
    if body.format:
        raise invalid("format", "cannot be combined with raw")
    limit, shared = _shared(body)
    return CompletionRequest(prompt=body.prompt, max_tokens=-1 if limit is None else limit, **shared)


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


def _format(given: schema.Format | None) -> dict[str, Any] | None:
    if not given:
        return None
    if isinstance(given, dict):
        return {"type": "json_schema", "json_schema": {"name": "format", "schema": given}}
    return {"type": "json_object"}


# --- answers ----------------------------------------------------------------------------------------------------------
class OllamaBuilder:
    """Lines of `/api/chat` or `/api/generate`."""

    def __init__(self, kind: str, model: str) -> None:
        self._model, self._began = model + LATEST, time.perf_counter()
        self._text: Callable[[str], dict[str, Any]] = (
            (lambda text: {"message": schema.OllamaAnswer(content=text)})
            if kind == "chat"
            else (lambda text: {"response": text})
        )
        self._line: Callable[..., msgspec.Struct] = _LINES[kind]

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """A line of new text."""
        if not isinstance(event, Delta) or not event.text:
            return ()
        return [self._made(event.text, done=False)]

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """The last line."""
        assert ending is not None
        return [self._last("", reason, ending)]

    def usage(self, usage: Usage) -> msgspec.Struct:
        """Never asked for: counts are in the last line."""
        raise AssertionError("there is no line of usage")

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        """The whole answer."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        return self._last("".join(outcome.text), finish_reason(outcome.finished), ending)

    def loaded(self) -> msgspec.Struct:
        """The answer to a request without a prompt, which only loads the model."""
        return self._made("", done=True, done_reason="load")

    def _last(self, text: str, reason: FinishReason, ending: Ending) -> msgspec.Struct:
        return self._made(
            text,
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

    def _made(self, text: str, **more: Any) -> msgspec.Struct:
        return self._line(model=self._model, created_at=timestamp(time.time()), **self._text(text), **more)


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


def shown(model: ModelInfo) -> schema.OllamaShown:
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
        capabilities=["completion", *(["embedding"] if model.pooling is not None else [])],
        modified_at=timestamp(model.created),
    )
