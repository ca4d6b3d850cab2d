"""Snapshots of sessions with the recall memory: what binds them to an engine, their arrays, and what they hold."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from atlas_jax.config import PAGE, MemoryConfig, ModelConfig
from atlas_jax.engine.api import LayerMemoryInfo, MemoryInfo, SnapshotInvalid, StateBytes
from atlas_jax.engine.memory_budget import SessionBytes, session_bytes
from atlas_jax.engine.runner.decode_state import Sequences, kept_pages
from atlas_jax.engine.sessions.host_arrays import shared_zeros, to_host, to_numpy
from atlas_jax.engine.sessions.info import norm_and_rank, summary
from atlas_jax.engine.sessions.kept_layout import choice_arrays, kept_pairs, pair_choice, pool_arrays, without_kept
from atlas_jax.engine.sessions.layout import integer
from atlas_jax.engine.sessions.lora import check_loaded, read_lora, scales_of
from atlas_jax.engine.sessions.session import Checkpoint, Session, SessionShape
from atlas_jax.engine.sessions.snapshot_arrays import SnapshotArrays
from atlas_jax.kernels.gated_delta import DeltaState
from atlas_jax.kernels.kv_pages import KVDtype, LayerKV, Pages, QuantPages
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kept_pairs import kept_count
from atlas_jax.model.kv_cache import KVCache, init_kv_cache
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.transformer import QUERY_SAMPLES, SINKS, LayerState
from atlas_jax.recall.recall_state import RecallState


@dataclass(frozen=True)
class RecallLayout:
    """Implements `layout.Layout` for a pretrained model with the recall memory.

    Attributes:
      adapter: digest of the memory's adapter; another one's keys mean something else.
      lora: digests of the LoRA adapters that are loaded.
    """

    model: ModelConfig
    memory: MemoryConfig
    kv_dtype: KVDtype
    fingerprint: str
    adapter: str
    lora: tuple[str, ...] = ()

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.model.vocab

    @property
    def default_shape(self) -> SessionShape:
        """Shape of a session that has read nothing yet; its first request replaces it."""
        plan = PageSchedule(window=min(4, self.memory.max_window // PAGE))
        return SessionShape(plan, layers=1, degree=2, rewinds=not self.model.recurrent)

    @property
    def capacity(self) -> int:
        """Independent pairs that one session's memory can hold."""
        return self.memory.features

    @property
    def largest_window(self) -> int:
        """Tokens of the largest window this engine has room for."""
        return self.memory.max_window

    @property
    def largest_snapshot(self) -> int:
        """Bytes of the largest snapshot this engine could write, a little rounded up."""
        return self._sizes.total(self.memory.ring, self.memory.max_kept) + (16 << 20)

    @cached_property
    def _sizes(self) -> SessionBytes:
        return session_bytes(self.model, self.memory, self.kv_dtype)

    @cached_property
    def _division(self) -> KeptDivision:
        return KeptDivision.of(self.model, self.memory.kept_weights)

    def header(self) -> dict[str, Any]:
        """The part of a snapshot's header that binds it to this engine."""
        memory = self.memory
        return {
            "model": self.fingerprint,
            "memory": [list(memory.layers), memory.components, memory.features, memory.code_dim, QUERY_SAMPLES],
            "adapter": self.adapter,
            "kv_dtype": self.kv_dtype,
        }

    def shape(self, header: Mapping[str, Any]) -> SessionShape:
        """The shape a header describes; raises SnapshotInvalid where this engine has no room for it."""
        window, update = integer(header, "window", 1, 1 << 16), integer(header, "update", 1, 1 << 16)
        if (window + update) * PAGE > self.memory.ring:
            raise SnapshotInvalid(f"snapshot's window of {window * PAGE} tokens exceeds this server's largest")
        layers, degree = integer(header, "layers", 1, len(self.memory.layers)), integer(header, "degree", 1, 3)
        kept, budget = integer(header, "kept", 0, 1 << 20), integer(header, "budget", 0, 1 << 50)
        if kept > self.memory.max_kept:
            raise SnapshotInvalid(f"snapshot's {kept} kept pairs exceed this server's most, {self.memory.max_kept}")
        lora = read_lora(header)
        check_loaded([digest for digest, _ in lora], self.lora)
        plan, capacities = PageSchedule(window, update), self._division.capacities(kept)
        return SessionShape(plan, layers, degree, kept, budget, capacities, not self.model.recurrent, lora)

    def rest(self, shape: SessionShape, checkpoint: Checkpoint) -> Checkpoint:
        """The same state as it rests in host memory; what was never written takes no room there."""
        cache, memory = checkpoint.row.cache, checkpoint.row.memory
        if memory is not None and not checkpoint.absorbed:
            zeros: dict[str, Any] = {}
            for name in _MATRICES:
                array = getattr(memory, name)
                zeros[name] = shared_zeros(array.shape, array.dtype)
            memory = replace(memory, **zeros)
        # pairs may have been kept of a text whose writes all diverged, and none where much was written
        if not checkpoint.kept(shape):
            cache = without_kept(cache, queries=not shape.kept)
        return replace(checkpoint, row=to_host(Sequences(cache, memory)))

    def arrays(self, shape: SessionShape, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        """A state as arrays: the pages in use, the memory, and what a later write and the gate can still need."""
        return _row_arrays(self, shape, checkpoint)

    def row(self, shape: SessionShape, position: int, page: int, arrays: Mapping[str, np.ndarray]) -> Sequences:
        """The state again, on the host; raises SnapshotInvalid for an array this engine would not have made."""
        return _row(self, shape, position, page, arrays)

    def state_bytes(self, ring: int, kept: int, budget: int) -> StateBytes:
        """What the window, the kept pairs and the recall memory of a session take."""
        return self._sizes.parts(ring, kept, budget) if ring else StateBytes()

    def describe(self, sessions: list[Session]) -> MemoryInfo:
        """What the memories of some sessions hold, together."""
        features = self.memory.features

        def layers(session: Session, checkpoint: Checkpoint) -> list[LayerMemoryInfo]:
            memory = checkpoint.row.memory
            norm, rank = (0.0, 0.0) if memory is None else norm_and_rank(_matrix(memory))
            taps = self.memory.layers[: session.shape.layers]  # there is one matrix, whose keys are made of all of them
            loss = session.stats.omega_loss
            return [LayerMemoryInfo(layer=taps[0], taps=taps, norm=norm, effective_rank=rank, omega_loss=loss)]

        return summary(sessions, features, layers, self.state_bytes)


_MATRICES = ("weights", "momentum")
_ZERO_AT_FIRST = (*_MATRICES, "scale")
"""Arrays of a memory that are left out of a snapshot where they are zero."""


def _matrix(memory: RecallState) -> np.ndarray:
    """M of a row as numbers."""
    matrix: np.ndarray = np.asarray(memory.weights)[0] * np.asarray(memory.scale)[0][:, None]
    return matrix


def _kept_positions(memory: MemoryConfig, plan: PageSchedule, position: int) -> np.ndarray:
    """Positions whose states a later write can still need: two pages more than its keys are made of."""
    assert plan.window is not None
    kept = (plan.window + plan.update) * PAGE + memory.max_omega_window
    return np.arange(max(0, position - kept), position)


def _row_arrays(layout: RecallLayout, shape: SessionShape, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    plan = shape.plan
    row = to_numpy(checkpoint.row)
    cache, memory = row.cache, row.memory
    assert memory is not None
    ring = plan.ring((checkpoint.page + 1) * PAGE)
    out: dict[str, np.ndarray] = {
        "page": np.asarray(cache.page)[0, :ring],
        "seen": np.packbits(np.asarray(memory.seen)[0].astype(bool)),
        "loss": np.asarray(memory.loss),
        "momentum_end": np.asarray(memory.momentum_end),
    }
    for name in _ZERO_AT_FIRST:  # the memory is most of a snapshot, and nothing while the text is inside the window
        array = np.asarray(getattr(memory, name))[0]
        if array.any():
            out[name] = array
    kept = _kept_positions(layout.memory, plan, checkpoint.position)
    slots = kept % layout.memory.ring
    for name in ("states", "tokens", "told"):
        out[name] = np.asarray(getattr(memory, name))[0, slots]
    for index, layer in enumerate(cache.kv):
        if isinstance(layer, DeltaState):
            out[f"{index}.inputs"], out[f"{index}.memory"] = np.asarray(layer.inputs)[0], np.asarray(layer.memory)[0]
            continue
        for name, pages in (("k", layer.k), ("v", layer.v)):
            if isinstance(pages, QuantPages):
                out[f"{index}.{name}"] = np.asarray(pages.values)[0, :ring]
                out[f"{index}.{name}.scale"] = np.asarray(pages.scale)[0, :ring]
            else:
                out[f"{index}.{name}"] = np.asarray(pages)[0, :ring]
        out[f"{index}.sink_k"], out[f"{index}.sink_v"] = np.asarray(layer.sink_k)[0], np.asarray(layer.sink_v)[0]
        if layer.choice is not None and shape.kept:
            out |= choice_arrays(f"{index}.choice", layer.choice, ring, int(np.asarray(cache.kept)[0, index]))
    out["kept"] = np.asarray(cache.kept)
    if cache.pairs is not None and shape.kept:
        out |= pool_arrays("pairs", cache)
    return out


def _row(
    layout: RecallLayout, shape: SessionShape, position: int, page: int, arrays: Mapping[str, np.ndarray]
) -> Sequences:
    """Rebuilds a row in host memory."""
    given = SnapshotArrays(arrays)
    return Sequences(_cache(layout, shape, position, page, given), _memory(layout, shape.plan, position, given))


def _cache(layout: RecallLayout, shape: SessionShape, position: int, page: int, given: SnapshotArrays) -> KVCache:
    model, plan = layout.model, shape.plan
    ring = plan.ring((page + 1) * PAGE)
    kept = given.take("kept", (1, len(model.layers)), "i4")
    if kept[0].tolist() != [kept_count(plan.left(max(page, 0)), most) for most in shape.capacities]:
        raise SnapshotInvalid("snapshot's kept pairs do not add up")

    def pages(name: str) -> Pages:
        shape = (ring, model.kv_heads, PAGE, model.head_dim)
        if layout.kv_dtype == "float32":
            return given.take(name, shape, "f4")[None]  # type: ignore[return-value]
        values, scale = given.take(name, shape, "i1"), given.take(f"{name}.scale", shape[:-1], "f4")
        return QuantPages(values[None], scale[None])  # type: ignore[arg-type]

    def sink(name: str) -> np.ndarray:
        return given.take(name, (model.kv_heads, SINKS, model.head_dim), "f4")[None]

    def state(name: str, own: jax.Array) -> np.ndarray:
        return given.take(name, own.shape[1:], "f4")[None]

    room, saved = kept_pages(model, layout.memory), given if shape.kept else None
    empty = jax.eval_shape(functools.partial(init_kv_cache, model, 1, ring, layout.kv_dtype, room))

    def layer(i: int) -> LayerState:
        own = empty.kv[i]
        if isinstance(own, DeltaState):
            return DeltaState(state(f"{i}.inputs", own.inputs), state(f"{i}.memory", own.memory))  # type: ignore[arg-type]
        choice = own.choice
        if choice is not None:
            choice = pair_choice(f"{i}.choice", choice, ring, int(kept[0, i]), saved)
        return LayerKV(pages(f"{i}.k"), pages(f"{i}.v"), sink(f"{i}.sink_k"), sink(f"{i}.sink_v"), choice)  # type: ignore[arg-type]

    kv = tuple(layer(i) for i in range(len(model.layers)))
    numbers = given.take("page", (ring,), "i4")
    expected = np.full(ring, -1, np.int32)
    for number in range(max(0, page - ring + 1), page + 1):
        expected[plan.slot(number)] = number
    if not np.array_equal(numbers, expected):
        raise SnapshotInvalid("snapshot's pages do not add up")
    return KVCache(
        kv=kv,
        page=numbers[None],  # type: ignore[arg-type]
        slot=np.asarray([plan.slot(max(page, 0))], np.int32),  # type: ignore[arg-type]
        first_page=np.asarray([plan.left(max(page, 0))], np.int32),  # type: ignore[arg-type]
        position=np.asarray([position], np.int32),  # type: ignore[arg-type]
        kept=kept,  # type: ignore[arg-type]
        pairs=None if empty.pairs is None else kept_pairs("pairs", empty, kept[0], saved),
        lora=scales_of(shape.lora, layout.lora) if layout.lora else None,  # type: ignore[arg-type]
        kept_pages=empty.kept_pages,
    )


def _memory(layout: RecallLayout, plan: PageSchedule, position: int, given: SnapshotArrays) -> RecallState:
    config, vocab = layout.memory, layout.model.vocab
    kept = _kept_positions(config, plan, position)

    def ring(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
        whole = np.zeros((1, config.ring, *shape), kind)
        whole[0, kept % config.ring] = given.take(name, (len(kept), *shape), kind)
        return whole

    tokens = ring("tokens", (), "i4")
    if not ((tokens >= 0) & (tokens < vocab)).all():
        raise SnapshotInvalid("snapshot's tokens are out of range")
    momentum_end = given.take("momentum_end", (1,), "i4")
    if not 0 <= momentum_end[0] <= position:
        raise SnapshotInvalid("snapshot's momentum ends outside its text")
    seen = np.unpackbits(given.take("seen", (-(-vocab // 8),), "u1"))[:vocab].astype(np.int8)
    shapes = {
        "weights": ((config.code_dim, config.features), "i1"),
        "scale": ((config.code_dim,), "f4"),
        "momentum": ((config.code_dim, config.max_omega_window), "f2"),
    }
    matrices = {
        name: given.take(name, shape, kind)[None] if given.has(name) else shared_zeros((1, *shape), np.dtype(kind))
        for name, (shape, kind) in shapes.items()
    }
    return RecallState(
        **matrices,  # type: ignore[arg-type]
        momentum_end=momentum_end,  # type: ignore[arg-type]
        states=ring("states", (config.components,), "i1"),  # type: ignore[arg-type]
        tokens=tokens,  # type: ignore[arg-type]
        told=ring("told", (-(-config.code_dim // 8),), "u1"),  # type: ignore[arg-type]
        seen=seen[None],  # type: ignore[arg-type]
        loss=given.take("loss", (1,), "f4"),  # type: ignore[arg-type]
        losses=np.zeros(1, np.float32),  # type: ignore[arg-type]
        skipped=np.zeros(1, np.int32),  # type: ignore[arg-type]
        written=np.asarray([seen.any()]),  # type: ignore[arg-type]
    )
