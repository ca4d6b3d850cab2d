"""llama.cpp's completions in words of OpenAI's, and answers back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from atlas_jax.engine.api import Delta, Prompt, SamplingParams, TokenInfo
from server.schemas import llamacpp as schema
from server.schemas.completions import CompletionRequest
from server.schemas.shape import ShapedFields
from server.schemas.usage import Usage
from server.services.response_builder import Ending, FinishReason, Outcome, finish_reason, finite
from server.services.sampling import stop_strings
from server.validation import invalid, unsupported

Asking = schema.LlamaCompletionRequest | schema.InfillRequest
_BAN = -100


def with_pairs(raw: Any) -> Any:
    """A body whose biases are an object, as elsewhere; llama.cpp's clients may write pairs, and false for a token that must
    not come.

    Raises:
      BadRequest: a pair is none.
    """
    pairs = raw.get("logit_bias") if isinstance(raw, dict) else None
    if not isinstance(pairs, list):
        return raw
    out: dict[str, Any] = {}
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int):
            raise invalid(f"logit_bias[{index}]", "must be a token id and a bias")
        out[str(pair[0])] = _BAN if pair[1] is False else pair[1]
    return {**raw, "logit_bias": out}


def completion_request(body: Asking, prompt: Any) -> CompletionRequest:
    """The same request as a completion, of one sequence and without a limit unless it names one.

    Raises:
      BadRequest: several sequences are asked for.
    """
    if body.n not in (None, 1):
        raise unsupported("n")
    shared = {name: getattr(body, name) for name in ShapedFields.__struct_fields__}
    if body.max_tokens is None and body.n_predict is None:
        shared["n_predict"] = -1
    logprobs = body.n_probs or (0 if body.return_tokens else None)
    return CompletionRequest(prompt=prompt, logprobs=logprobs, **{**shared, "stream_options": None})


def settings_of(body: Asking, sampling: SamplingParams, *, model: str, context: int) -> schema.LlamaSettings:
    """What a request is generated with, its own fields and the server's for those it leaves out."""
    names = (
        *("temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("repeat_penalty", "presence_penalty", "frequency_penalty"),
    )
    given = {name: getattr(body, name) for name in names}
    limit = body.n_predict if body.max_tokens is None else body.max_tokens
    return schema.LlamaSettings(
        n_ctx=context,
        model=model,
        n_predict=-1 if limit is None else limit,
        seed=-1 if body.seed is None else body.seed,
        stop=list(stop_strings(body)),
        ignore_eos=bool(body.ignore_eos),
        stream=bool(body.stream),
        n_probs=body.n_probs or 0,
        grammar=body.grammar or "",
        **{name: getattr(sampling, name) if value is None else value for name, value in given.items()},
    )


class LlamaBuilder:
    """The answer of `/completion`, and the pieces of its stream."""

    def __init__(self, prompt: str, settings: schema.LlamaSettings, *, tokens: bool) -> None:
        """Begins one.

        Args:
          tokens: whether the ids of its tokens are told.
        """
        self._prompt, self._settings, self._wants_tokens = prompt, settings, tokens
        self._has_new_line = False
        self._held: list[TokenInfo] = []  # tokens whose text has not come out yet

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """A piece of new text."""
        if not isinstance(event, Delta):
            return ()
        self._held += event.tokens
        if not event.text:
            return ()
        self._has_new_line |= "\n" in event.text
        tokens, self._held = self._held, []
        return [schema.LlamaCompletion(content=event.text, stop=False, **self._tokens(tokens))]

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """The last piece, which has no text."""
        assert ending is not None
        return [self._last("", self._held, reason, ending)]

    def usage(self, usage: Usage) -> msgspec.Struct:
        """Never asked for: counts are in the last piece."""
        raise AssertionError("there is no piece of usage")

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        """The whole answer."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        self._has_new_line = "\n" in outcome.text
        return self._last(outcome.text, outcome.tokens, finish_reason(outcome.finished), ending)

    def _tokens(self, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        """What is told of tokens: their ids, their likelihood."""
        told: dict[str, Any] = {"tokens": [token.token for token in tokens]} if self._wants_tokens else {}
        if self._settings.n_probs and tokens:
            told["completion_probabilities"] = [
                schema.LlamaToken(
                    **_token(token.token, token.data, token.logprob or 0.0),
                    top_logprobs=[schema.LlamaTopToken(**_token(*one)) for one in token.top],
                )
                for token in tokens
            ]
        return told

    def _last(self, text: str, tokens: Sequence[TokenInfo], reason: FinishReason, ending: Ending) -> msgspec.Struct:
        usage = ending.usage
        return schema.LlamaCompletion(
            content=text,
            stop=True,
            **self._tokens(tokens),
            model=self._settings.model,
            prompt=self._prompt,
            generation_settings=self._settings,
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


def _token(token: int, data: bytes, logprob: float) -> dict[str, Any]:
    return {
        "id": token,
        "token": data.decode("utf-8", errors="replace"),
        "bytes": list(data),
        "logprob": finite(logprob),
    }
