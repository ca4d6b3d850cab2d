"""What comes out of the engine: the events of a request, in order; the last is `Finished` or `Failed`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from atlas_jax.engine.api.errors import EngineError
from atlas_jax.engine.api.info import StateBytes

FinishReason = Literal["stop", "length", "cancelled", "error"]
HistoryEffect = Literal["new", "continued", "appended", "rolled_back"]
"""What a prompt did to what its session holds; `engine.sessions.continuation` has the rules."""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token of the answer or, with `prompt_logprobs`, of the prompt.

    Attributes:
      data: the token's own bytes (a token may be part of a character).
      hidden: a control token of an answer, which is no part of its text.
      gate: weight that the memory's distribution had where the token was drawn; None unless `token_gates` was asked for.
      logprob: natural log under the distribution before temperature and filters; None for the first prompt token.
      top: alternatives (token, bytes, logprob), best first.
    """

    token: int
    data: bytes
    logprob: float | None = None
    top: tuple[tuple[int, bytes, float], ...] = ()
    hidden: bool = False
    gate: float | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt has been read; sent once, before any text, and only if `prompt_logprobs` was asked for."""

    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """The prompt's embedding, float32 of length 1; sent once, and only if `pooling` was asked for."""

    vector: np.ndarray


@dataclass(frozen=True, slots=True)
class Delta:
    """New text, complete characters only, with the tokens that produced it (none unless log-probabilities
    or gates were asked for)."""

    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryStats:
    """What the memory did in this request; every figure is measured in it.

    Attributes:
      history: what the prompt did to what the session holds; "new" without a session.
      tokens_reused: tokens of the prompt that the session held already and that were not read again.
      kept_pairs, kept_pairs_capacity: pairs kept of what has left the window, per KV head and on average per layer, and how
        many may be.
      state: bytes of the session's parts, or of the request's own where it has no session.
      tokens_absorbed: of the writes that were taken.
      writes_skipped: writes that were not taken because they diverged; `degraded` then says so.
    """

    memory_utilization: float
    window_fill_ratio: float
    omega_loss: float
    muon_iterations: int
    blend_ratio_actual: float
    tokens_absorbed: int
    session_id: str | None
    cache_hit: bool
    kept_pairs: int = 0
    kept_pairs_capacity: int = 0
    state: StateBytes = field(default_factory=StateBytes)
    history: HistoryEffect = "new"
    tokens_reused: int = 0
    writes_skipped: int = 0
    degraded: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The last event of a request that was accepted and did not fail.

    Attributes:
      stop: the stop string that matched, or None.
      cached_tokens: prompt tokens that did not have to be processed again.
      queue_seconds, prompt_seconds, decode_seconds: where the time went.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seed: int
    stop: str | None = None
    queue_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    memory: MemoryStats | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that failed after it was accepted."""

    error: EngineError


Event = Prompt | Embedded | Delta | Finished | Failed
Listener = Callable[[Event], None]
