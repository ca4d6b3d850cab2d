"""The memory endpoints' view of sessions."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import LayerMemoryInfo, MemoryInfo, StateBytes
from atlas_jax.engine.sessions.session import Checkpoint, Session
from atlas_jax.engine.sessions.snapshot import Listing


def summary(
    sessions: list[Session],
    capacity: int,
    layers_of: Callable[[Session, Checkpoint], list[LayerMemoryInfo]],
    state_bytes: Callable[[int, int, int], StateBytes],
    window: int = 0,
) -> MemoryInfo:
    """What the memories of some sessions hold, together.

    Args:
      capacity: independent pairs that one session's memory can hold.
      layers_of: tells of the layers of one session.
      state_bytes: as `Layout.state_bytes`.
      window: tokens attended exactly by a session without a window of its own.
    """
    held = [(s, s.checkpoints[-1]) for s in sessions if s.checkpoints]
    windows = [window if s.shape.plan.window is None else s.shape.plan.window * PAGE for s, _ in held]
    layers: dict[int, list[LayerMemoryInfo]] = {}
    for session, checkpoint in held:
        for info in layers_of(session, checkpoint):
            layers.setdefault(info.layer, []).append(info)
    updates = [s.stats.last_update for s, _ in held if s.stats.last_update is not None]
    return MemoryInfo(
        window_size=sum(windows),
        # With several pages a write, up to that many more tokens than the window's are attended until the next one.
        window_fill=sum(
            min(size, c.position - (0 if s.shape.plan.window is None else s.shape.plan.left(max(c.page, 0)) * PAGE))
            for size, (s, c) in zip(windows, held, strict=True)
        ),
        kept_pairs=sum(c.kept(s.shape) for s, c in held),
        kept_pairs_capacity=sum(s.shape.kept for s, _ in held),
        memory_capacity=capacity * max(1, len(held)),
        memory_used=sum(min(capacity, c.absorbed) for _, c in held),
        total_updates=sum(s.stats.updates for s, _ in held),
        last_update_time=max(updates, default=None),
        state=_sum(state_bytes(s.shape.plan.room * PAGE, s.shape.kept, s.shape.budget) for s, _ in held),
        layers=tuple(_mean_layer(infos) for _, infos in sorted(layers.items())),
    )


def totals(
    listings: Sequence[Listing],
    capacity: int,
    layers: tuple[LayerMemoryInfo, ...],
    state_bytes: Callable[[int, int, int], StateBytes],
) -> MemoryInfo:
    """What the memories of many sessions hold, whether they are in memory or only stored.

    Args:
      capacity, state_bytes: as `summary`.
      layers: of those in memory.
    """
    held = [one for one in listings if one.tokens]
    return MemoryInfo(
        window_size=sum(one.window for one in held),
        window_fill=sum(min(one.window, one.window_fill) for one in held),
        kept_pairs=sum(one.kept for one in held),
        kept_pairs_capacity=sum(one.kept_capacity for one in held),
        memory_capacity=capacity * max(1, len(held)),
        memory_used=sum(min(capacity, one.absorbed) for one in held),
        total_updates=sum(one.updates for one in held),
        last_update_time=max((one.last_update for one in held if one.last_update is not None), default=None),
        state=_sum(state_bytes(one.ring, one.kept_capacity, one.budget) for one in held),
        layers=layers,
    )


def norm_and_rank(weights: np.ndarray) -> tuple[float, float]:
    """Frobenius norm of a memory [outputs, inputs], and its effective rank: exp of the entropy of its singular values."""
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(weights.astype(np.float64) @ weights.T), 0.0))
    total = values.sum()
    if total == 0:
        return 0.0, 0.0
    share = values[values > 0] / total
    return float(np.linalg.norm(weights)), float(np.exp(-(share * np.log(share)).sum()))


def _sum(states: Iterable[StateBytes]) -> StateBytes:
    return functools.reduce(operator.add, states, StateBytes())


def _mean_layer(infos: list[LayerMemoryInfo]) -> LayerMemoryInfo:
    return LayerMemoryInfo(
        layer=infos[0].layer,
        taps=max((info.taps for info in infos), key=len),
        norm=sum(info.norm for info in infos) / len(infos),
        effective_rank=sum(info.effective_rank for info in infos) / len(infos),
        omega_loss=sum(info.omega_loss for info in infos) / len(infos),
    )
