"""What an engine has done since it started."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from atlas_jax.engine.api import StateBytes


@dataclass
class Counters:
    """What has happened since start; written by the engine's thread, read by anyone."""

    requests: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    memory_updates: int = 0
    muon_iterations: int = 0
    writes_skipped: int = 0
    omega_losses: float = 0.0
    omega_loss: float = 0.0
    memory_utilization: float = 0.0
    window_fill: float = 0.0
    kept_pairs: int = 0
    kept_pairs_capacity: int = 0
    state: StateBytes = field(default_factory=StateBytes)
    tokens_per_second: float = 0.0


_OF_THE_LAST = ("omega_loss", "memory_utilization", "window_fill", "kept_pairs", "kept_pairs_capacity", "state")
"""What is of one request, not a sum."""


def together(counters: Sequence[Counters]) -> Counters:
    """What several schedulers of one engine have done, the latest last."""
    total = dataclasses.replace(counters[-1])
    for field_ in dataclasses.fields(Counters):
        if field_.name not in _OF_THE_LAST:
            setattr(total, field_.name, sum(getattr(one, field_.name) for one in counters))
    return total
