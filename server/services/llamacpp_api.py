"""llama.cpp's completions in words of OpenAI's, and answers back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from atlas_jax.engine.api import Delta, Prompt
from server.schemas import llamacpp as schema
from server.schemas.completions import CompletionRequest
from server.schemas.shape import ShapedFields
from server.schemas.usage import Usage
from server.services.response_builder import Ending, FinishReason, Outcome, finish_reason
from server.validation import unsupported


def completion_request(body: ShapedFields, prompt: Any) -> CompletionRequest:
    """The same request as a completion, of one sequence and without a limit unless it names one.

    Raises:
      BadRequest: several sequences are asked for.
    """
    if body.n not in (None, 1):
        raise unsupported("n")
    shared = {name: getattr(body, name) for name in ShapedFields.__struct_fields__}
    if body.max_tokens is None and body.n_predict is None:
        shared["n_predict"] = -1
    return CompletionRequest(prompt=prompt, **{**shared, "stream_options": None})


class LlamaBuilder:
    """The answer of `/completion`, and the pieces of its stream."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._has_new_line = False

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """A piece of new text."""
        if not isinstance(event, Delta) or not event.text:
            return ()
        self._has_new_line |= "\n" in event.text
        return [schema.LlamaCompletion(content=event.text, stop=False)]

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """The last piece, which has no text."""
        assert ending is not None
        return [self._last("", reason, ending)]

    def usage(self, usage: Usage) -> msgspec.Struct:
        """Never asked for: counts are in the last piece."""
        raise AssertionError("there is no piece of usage")

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        """The whole answer."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        text = outcome.text
        self._has_new_line = "\n" in text
        return self._last(text, finish_reason(outcome.finished), ending)

    def _last(self, text: str, reason: FinishReason, ending: Ending) -> msgspec.Struct:
        usage = ending.usage
        return schema.LlamaCompletion(
            content=text,
            stop=True,
            model=self._model,
            tokens_predicted=usage.completion_tokens,
            tokens_evaluated=usage.prompt_tokens,
            tokens_cached=usage.prompt_tokens_details.cached_tokens,
            truncated=False,
            stop_type="limit" if reason == "length" else "eos" if ending.stop is None else "word",
            stopping_word=ending.stop or "",
            has_new_line=self._has_new_line,
            timings=ending.timings,
            atlas_stats=ending.atlas_stats,
        )
