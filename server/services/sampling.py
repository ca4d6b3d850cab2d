"""From the sampling fields of a request and the server's defaults to the engine's `SamplingParams`, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from atlas_jax.engine.api import SamplingParams
from server.config.settings import SamplingSection
from server.schemas.sampling import SamplingFields
from server.validation import invalid

V = TypeVar("V")
MAX_SEED = (1 << 63) - 1
MAX_SEQUENCES = 512
# Below this a temperature cannot be told from greedy in float32, and dividing by it overflows.
_GREEDY_BELOW = 1e-4
_LOGIT_DIGITS = 10


# What reads well from a small model: SmolLM2-135M drawn from its own distribution writes word salad. Of 48 answers to three
# plain questions 25 were right at temperature 0.7 with min_p 0.05, 28 with these; a lower one has stories that repeat.
_OURS = SamplingParams(temperature=0.5, top_p=0.95, min_p=0.1)


def default_sampling(section: SamplingSection, recommended: Mapping[str, float]) -> SamplingParams:
    """What requests get for the fields they leave out: the operator's choice, else the model's, else the project's.

    Args:
      recommended: of the model's file (`ModelInfo.sampling`). A file that recommends anything is not mixed with the
        project's own defaults, which were chosen together.
    """
    base = SamplingParams(**recommended) if recommended else _OURS  # type: ignore[arg-type]
    chosen: dict[str, Any] = {name: getattr(section, name) for name in SamplingSection.__struct_fields__}
    return replace(base, **{name: value for name, value in chosen.items() if value is not None})


def sampling_params(
    fields: SamplingFields, *, default: SamplingParams, vocab_size: int, logprobs: int | None
) -> SamplingParams:
    """The sampling of one request; fields that are null or absent are taken from `default`."""
    temperature = _or(fields.temperature, default.temperature)
    return SamplingParams(
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=max(0, _or(fields.top_k, default.top_k)),
        top_p=_or(fields.top_p, default.top_p),
        min_p=_or(fields.min_p, default.min_p),
        typical_p=_or(fields.typical_p, default.typical_p),
        repeat_penalty=_or(fields.repeat_penalty, default.repeat_penalty),
        presence_penalty=_or(fields.presence_penalty, default.presence_penalty),
        frequency_penalty=_or(fields.frequency_penalty, default.frequency_penalty),
        logit_bias=_logit_bias(fields.logit_bias or {}, vocab_size),
        seed=None if fields.seed is None or fields.seed == -1 else fields.seed & MAX_SEED,
        logprobs=logprobs,
    )


def stop_strings(fields: SamplingFields) -> tuple[str, ...]:
    """The stop strings as a tuple; empty ones, which would stop everything, are dropped."""
    given = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    return tuple(dict.fromkeys(text for text in given if text))


def token_limit(values: Mapping[str, int | None], *, default: int | None) -> int | None:
    """The one token limit of a request that may write it under several names; None is no limit.

    Raises:
      BadRequest: two names with different values.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        *_, last = given
        raise invalid(last, f"differs from {next(iter(given))}, which means the same")
    for value in given.values():
        return None if value == -1 else value
    return default


def choices(fields: SamplingFields, *, prompts: int) -> int:
    """How many sequences each prompt gets."""
    count = _or(fields.n, 1)
    if count * prompts > MAX_SEQUENCES:
        raise invalid("n", f"prompts times n must be at most {MAX_SEQUENCES}")
    return count


def _logit_bias(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    out: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= _LOGIT_DIGITS and int(key) < vocab_size):
            raise invalid("logit_bias", f"keys must be token ids between 0 and {vocab_size - 1}")
        out[int(key)] = bias
    return out


def _or(value: V | None, default: V) -> V:
    return default if value is None else value
