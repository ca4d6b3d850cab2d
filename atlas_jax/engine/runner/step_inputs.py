"""A request's settings as the arrays the compiled step reads; made on the host, each a batch of one or a scalar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atlas_jax.engine.api import MemoryParams, SamplingParams
from atlas_jax.engine.memory_options import CacheStrategy
from atlas_jax.engine.runner.decode_state import DRAFT_CONTEXT
from atlas_jax.engine.sessions.journal import Reading
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.kernels.sampling import BAN, BIAS_SLOTS, FORCE, SamplingState
from atlas_jax.kernels.speculative_drafter import NONE
from atlas_jax.recall.recall_state import RecallSettings, WriteSettings
from atlas_jax.recall.solvers import Optimizer

CALIBRATED_STEP = 1e-3
"""The `learning_rate` that means the calibrated inner step: one exact line search. Others are relative to it."""

SCORE_DECAY: dict[CacheStrategy, float] = {"lru": 0.5, "adaptive": 0.9, "lfu": 1.0}
"""Of a kept pair's score, with every write: what was attended last, what has been attended in all, and between. Of five
documents (SmolLM2-135M, 4 608 tokens, 512 pairs in 8 bits, 16 and 32 queries a page) 0.9 closed 0.626 and 0.667 of the gap
between window and full attention, 0.8 with 32 as much, 0.98 0.599 and 0.638, 1.0 with 16 0.585."""

LARGEST_BIAS = 100.0
"""From here on a bias bans or forces its token."""
_LEAST_TEMPERATURE = 2.0**-126
_LEAST_REPEAT_PENALTY = 1e-6
_NEVER = 2**31 - 1


@dataclass(frozen=True)
class MemoryWrite:
    """How a sequence's memory is written.

    Attributes:
      window: tokens in the Omega objective.
      step: factor on the calibrated inner step.
      degree: polynomial degree.
      kept: the most pairs kept per KV head, on average per layer.
      decay: of the scores by which they are chosen, from one write to the next.
    """

    window: int
    optimizer: Optimizer
    step: float
    degree: int
    kept: int = 0
    decay: float = 1.0

    @classmethod
    def from_params(cls, params: MemoryParams, shape: SessionShape) -> MemoryWrite:
        """What a request asks for in a session of this shape."""
        optimizer: Optimizer = "exact" if params.use_muon is None else "muon" if params.use_muon else "gradient"
        step = 1.0 if params.learning_rate is None else params.learning_rate / CALIBRATED_STEP
        decay = SCORE_DECAY[params.cache_strategy]
        return cls(params.omega_window, optimizer, step, shape.degree, shape.kept, decay)

    @classmethod
    def from_reading(cls, reading: Reading) -> MemoryWrite:
        """What a journal says of a request."""
        how = reading.omega_window, reading.optimizer, reading.step, reading.degree
        return cls(*how, reading.kept, reading.decay)

    def reading(self, shape: SessionShape) -> Reading:
        """What a journal keeps of a request that is written so."""
        plan = shape.plan
        of_shape = plan.window, plan.update, shape.layers, shape.degree, shape.kept, shape.budget
        return Reading(*of_shape, self.optimizer, self.window, self.step, self.decay, shape.lora)


def write_settings(write: MemoryWrite, end: int) -> WriteSettings:
    """One memory write; `end` is the first position still in the window."""
    values: dict[str, Any] = {
        "end": np.int32(end),
        "window": np.int32(write.window),
        "step": np.float32(write.step),
        "degree": np.int32(write.degree - 1),
    }
    return WriteSettings(**values)


def memory_settings(params: MemoryParams | None, layers: int, degree: int) -> RecallSettings:
    """How a row reads its memory; `layers` and `degree` are its session's."""
    blend = params.blend_ratio if params is not None and params.read else 0.0
    odds = np.log(max(blend, 1e-12)) - np.log(max(1.0 - blend, 1e-12))
    odds = np.clip(odds, -30.0, 30.0)
    values: dict[str, Any] = {
        "layers": np.asarray([layers - 1], np.int32),
        "degree": np.asarray([degree - 1], np.int32),
        "read": np.asarray([blend > 0], bool),
        "read_from": np.asarray([0 if params is None else min(params.warmup_tokens, _NEVER)], np.int32),
        "log_odds": np.asarray([odds], np.float32),
    }
    return RecallSettings(**values)


def recent_text(tokens: Sequence[int], position: int) -> np.ndarray:
    """Where the n-gram drafter looks for a match, [1, DRAFT_CONTEXT]; `tokens` are the latest, the last at `position`."""
    text = np.full((1, DRAFT_CONTEXT), NONE, np.int32)
    latest = np.asarray(tokens[-DRAFT_CONTEXT:], np.int32)
    text[0, np.arange(position + 1 - len(latest), position + 1) % DRAFT_CONTEXT] = latest
    return text


def _bias(value: float) -> float:
    """A bias as the sampler adds it: at its ends it bans and forces a token, whatever the temperature."""
    return BAN if value <= -LARGEST_BIAS else FORCE if value >= LARGEST_BIAS else value


def sampling_state(params: SamplingParams, vocab: int, seed: int, prompt: Sequence[int]) -> SamplingState:
    """How a row draws its tokens."""

    def number(value: float) -> np.ndarray:
        return np.asarray([value], np.float32)

    bias_token = np.full((1, BIAS_SLOTS), vocab, np.int32)
    bias = np.zeros((1, BIAS_SLOTS), np.float32)
    bias_token[0, : len(params.logit_bias)] = list(params.logit_bias)
    bias[0, : len(params.logit_bias)] = [_bias(value) for value in params.logit_bias.values()]
    present = np.zeros((1, vocab), np.int8)
    if params.repeat_penalty != 1.0:
        present[0, np.asarray(prompt, np.int64)] = 1
    values: dict[str, Any] = {
        # numbers that are 0 to a processor that flushes the smallest ones are 0 to everybody
        "temperature": number(params.temperature if params.temperature >= _LEAST_TEMPERATURE else 0.0),
        "top_k": np.asarray([min(params.top_k, vocab)], np.int32),
        "top_p": number(params.top_p),
        "min_p": number(params.min_p),
        "typical_p": number(params.typical_p),
        "repeat_penalty": number(max(params.repeat_penalty, _LEAST_REPEAT_PENALTY)),
        "presence_penalty": number(params.presence_penalty),
        "frequency_penalty": number(params.frequency_penalty),
        "seed": np.asarray([[seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]], np.uint32),
        "bias_token": bias_token,
        "bias": bias,
        "generated": np.zeros((1, vocab), np.int16),
        "present": present,
        "logprobs": np.asarray([int(bool(params.logprobs))], np.int32),
    }
    return SamplingState(**values)
