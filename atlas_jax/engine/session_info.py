"""The memory endpoints' view of sessions."""

from __future__ import annotations

import numpy as np

from atlas_jax.config import PAGE, MemoryConfig
from atlas_jax.engine.api import LayerMemoryInfo, MemoryInfo
from atlas_jax.engine.session import Checkpoint, Session


def describe(config: MemoryConfig, sessions: list[Session]) -> MemoryInfo:
    """What the memories of some sessions hold, together."""
    held = [(s, s.checkpoints[-1]) for s in sessions if s.checkpoints]
    windows = [s.shape.plan.window or 0 for s, _ in held]
    layers: dict[int, list[LayerMemoryInfo]] = {}
    for session, checkpoint in held:
        norm, rank = _norm_and_rank(checkpoint)
        for layer in config.layers[: session.shape.layers]:
            layers.setdefault(layer, []).append(
                LayerMemoryInfo(layer=layer, norm=norm, effective_rank=rank, omega_loss=session.stats.omega_loss)
            )
    updates = [s.stats.last_update for s, _ in held if s.stats.last_update is not None]
    return MemoryInfo(
        window_size=max(windows, default=0) * PAGE,
        window_fill=sum(c.position - s.shape.plan.left(max(c.page, 0)) * PAGE for s, c in held),
        memory_capacity=config.features * max(1, len(held)),
        memory_used=sum(min(config.features, c.absorbed) for _, c in held),
        total_updates=sum(s.stats.updates for s, _ in held),
        last_update_time=max(updates, default=None),
        layers=tuple(_mean_layer(infos) for _, infos in sorted(layers.items())),
    )


def _norm_and_rank(checkpoint: Checkpoint) -> tuple[float, float]:
    """Frobenius norm of the memory, and its effective rank: exp of the entropy of its normalised singular values."""
    memory = checkpoint.row.memory
    if memory is None:
        return 0.0, 0.0
    weights = np.asarray(memory.weights)[0]
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(weights.astype(np.float64) @ weights.T), 0.0))
    total = values.sum()
    if total == 0:
        return 0.0, 0.0
    share = values[values > 0] / total
    return float(np.linalg.norm(weights)), float(np.exp(-(share * np.log(share)).sum()))


def _mean_layer(infos: list[LayerMemoryInfo]) -> LayerMemoryInfo:
    return LayerMemoryInfo(
        layer=infos[0].layer,
        norm=sum(info.norm for info in infos) / len(infos),
        effective_rank=sum(info.effective_rank for info in infos) / len(infos),
        omega_loss=sum(info.omega_loss for info in infos) / len(infos),
    )
