"""One session: what it has read, its state at the end of the last turns, and how that is written to a snapshot."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from atlas_jax.config import PAGE, MemoryConfig, ModelConfig
from atlas_jax.engine import snapshot
from atlas_jax.engine.api import SessionKey, SnapshotInvalid
from atlas_jax.engine.history import History
from atlas_jax.engine.state import Sequences
from atlas_jax.kernels.attention import KVDtype, LayerKV, Pages, QuantPages
from atlas_jax.memory.recall import RECENT, MemoryState
from atlas_jax.model.context import Context
from atlas_jax.model.transformer import SINKS
from atlas_jax.model.window import WindowPlan


@dataclass(frozen=True)
class SessionShape:
    """What a session keeps from its first request to its end.

    Attributes:
      plan: its window.
      layers: tapped layers in use.
      degree: polynomial degree.
    """

    plan: WindowPlan
    layers: int
    degree: int


@dataclass(frozen=True)
class Checkpoint:
    """A session's state at one position; immutable.

    Attributes:
      position: tokens read.
      page: the last page that has begun, −1 before the first.
      row: the state, on the device or on the host.
      absorbed: tokens written to the memory so far.
    """

    position: int
    page: int
    row: Sequences
    absorbed: int

    @property
    def bytes(self) -> int:
        """Size of the arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.row))

    def reachable(self, plan: WindowPlan) -> int:
        """The earliest position this state can be rolled back to for nothing: the window still holds what was seen."""
        if self.page < 0:
            return 0
        page = self.page
        while page > 0 and plan.left(page - 1) == plan.left(self.page):
            page -= 1
        return page * PAGE


@dataclass
class SessionStats:
    """Counters of one session."""

    updates: int = 0
    muon_iterations: int = 0
    omega_loss: float = 0.0
    last_update: float | None = None


@dataclass(frozen=True)
class Appended:
    """New text a turn brought: where the session was before it, and what was read from there."""

    prompt: list[int]
    position: int
    feed: list[int]


@dataclass
class Session:
    """A named conversation of one owner.

    Attributes:
      checkpoints: states at the ends of turns, oldest first; the last is the present one.
      pending: the last token the model drew, not read yet: it precedes new text that is appended.
      appended: the last turn, if it brought only new text: further choices of the same request answer it too.
      state: JSON a caller stored with it, or None.
      changed: counts changes, to tell whether a file is up to date.
    """

    key: SessionKey
    shape: SessionShape
    history: History = field(default_factory=History)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    stats: SessionStats = field(default_factory=SessionStats)
    pending: int | None = None
    appended: Appended | None = None
    state: Any = None
    has_state: bool = False
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    changed: int = 0

    def resume(self, keep: int) -> tuple[Checkpoint | None, int]:
        """The state from which to read on after the first `keep` tokens, and the position it will be at.

        A checkpoint at or after `keep` serves if it can be rolled back that far; else the latest before it; else none,
        which is the empty state at position 0.
        """
        best: tuple[Checkpoint | None, int] = (None, 0)
        for checkpoint in self.checkpoints:
            if checkpoint.position <= keep:
                position = checkpoint.position
            elif checkpoint.reachable(self.shape.plan) <= keep:
                position = keep
            else:
                continue
            if position >= best[1] and (position == 0 or position >= self.history.tail_start):
                best = (checkpoint, position)
        return best


def to_host(row: Sequences) -> Sequences:
    """The same row as NumPy arrays."""
    return jax.tree.map(np.asarray, row)


@dataclass(frozen=True)
class Layout:
    """What a snapshot must match to be loaded by this engine.

    Attributes:
      adapter: digest of the memory's adapter; another one's keys mean something else.
    """

    model: ModelConfig
    memory: MemoryConfig
    kv_dtype: KVDtype
    fingerprint: str
    adapter: str

    @property
    def default_shape(self) -> SessionShape:
        """Shape of a session that has read nothing yet; its first request replaces it."""
        return SessionShape(WindowPlan(window=4), layers=1, degree=2)

    @property
    def largest_snapshot(self) -> int:
        """Bytes of the largest snapshot this engine could write, a little rounded up."""
        model, memory = self.model, self.memory
        number = 1 if self.kv_dtype == "int8" else 4
        cache = 2 * len(model.layers) * model.kv_heads * (memory.ring + SINKS) * (model.head_dim * number + 8)
        matrices = memory.features * memory.code_dim * 9
        return cache + matrices + memory.ring * (memory.key_size + 1) * 4 + model.vocab + (16 << 20)

    def header(self) -> dict[str, Any]:
        """The part of a snapshot's header that binds it to this engine."""
        memory = self.memory
        return {
            "model": self.fingerprint,
            "memory": [list(memory.layers), memory.components, memory.features, memory.code_dim],
            "adapter": self.adapter,
            "kv_dtype": self.kv_dtype,
        }


def encode_session(layout: Layout, session: Session) -> bytes:
    """Serialises a session's present state; earlier checkpoints are not kept."""
    header: dict[str, Any] = {
        **layout.header(),
        "owner": session.key.owner,
        "session_id": session.key.session_id,
        "window": session.shape.plan.window,
        "update": session.shape.plan.update,
        "layers": session.shape.layers,
        "degree": session.shape.degree,
        "length": session.history.length,
        "first_reply": session.history.first_reply,
        "pending": session.pending,
        "updates": session.stats.updates,
        "muon_iterations": session.stats.muon_iterations,
        "omega_loss": session.stats.omega_loss,
        "last_update": session.stats.last_update,
        "created": session.created,
        "last_used": session.last_used,
        "state": session.state,
        "has_state": session.has_state,
    }
    arrays: dict[str, np.ndarray] = {
        "history.tail": np.asarray(session.history.tail, np.int32),
        "history.digests": np.frombuffer(b"".join(session.history.digests), np.uint8),
    }
    if session.checkpoints:
        last = session.checkpoints[-1]
        header |= {"position": last.position, "page": last.page, "absorbed": last.absorbed}
        arrays |= _row_arrays(layout, session.shape.plan, last)
    return snapshot.encode(header, arrays)


def decode_session(layout: Layout, data: bytes) -> Session:
    """Reads a session back.

    Raises:
      SnapshotInvalid: it is damaged, or belongs to another model, memory or cache type; the message says which.
    """
    header, arrays = snapshot.decode(data)
    for name, wanted in layout.header().items():
        if header.get(name) != wanted:
            raise SnapshotInvalid(f"snapshot was made with another {_BOUND[name]}")
    try:
        return _session(layout, header, arrays)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SnapshotInvalid("snapshot is damaged: its header does not describe a session") from error


_BOUND = {"model": "model", "memory": "memory configuration", "adapter": "memory adapter", "kv_dtype": "cache type"}


def _session(layout: Layout, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Session:
    window, update = _integer(header, "window", 1, 1 << 16), _integer(header, "update", 1, 1 << 16)
    if (window + update) * PAGE > layout.memory.ring:
        raise SnapshotInvalid(f"snapshot's window of {window * PAGE} tokens exceeds this server's largest")
    plan = WindowPlan(window, update)
    length = _integer(header, "length", 0, 1 << 30)
    tail = snapshot.check_array(
        "history.tail", arrays.get("history.tail"), _any(arrays, "history.tail"), np.dtype("i4")
    )
    digests = arrays["history.digests"].tobytes()
    if len(tail) > length or len(digests) != length // PAGE * 8:
        raise SnapshotInvalid("snapshot's history does not add up")
    if tail.size and not (tail.min() >= 0 and tail.max() < layout.model.vocab):
        raise SnapshotInvalid("snapshot's history holds unknown tokens")
    reply = header["first_reply"]
    history = History(
        length=length,
        digests=[digests[i : i + 8] for i in range(0, len(digests), 8)],
        tail=[int(t) for t in tail],
        first_reply=None if reply is None else _integer(header, "first_reply", 0, length),
    )
    checkpoints = []
    if "position" in header:
        position = _integer(header, "position", length, length)
        page = _integer(header, "page", (position - 1) // PAGE if position else -1, position // PAGE)
        row = _row(layout, plan, position, page, arrays)
        checkpoints.append(Checkpoint(position, page, row, _integer(header, "absorbed", 0, length)))
    elif length:
        raise SnapshotInvalid("snapshot has a history but no state")
    last_update, pending = header["last_update"], header["pending"]
    return Session(
        key=SessionKey(str(header["owner"]), str(header["session_id"])),
        shape=SessionShape(
            plan, _integer(header, "layers", 1, len(layout.memory.layers)), _integer(header, "degree", 1, 3)
        ),
        history=history,
        checkpoints=checkpoints,
        stats=SessionStats(
            updates=_integer(header, "updates", 0, 1 << 40),
            muon_iterations=_integer(header, "muon_iterations", 0, 1 << 40),
            omega_loss=float(header["omega_loss"]),
            last_update=None if last_update is None else float(last_update),
        ),
        pending=None if pending is None else _integer(header, "pending", 0, layout.model.vocab - 1),
        state=header["state"],
        has_state=bool(header["has_state"]),
        created=float(header["created"]),
        last_used=float(header["last_used"]),
    )


def _integer(header: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = header[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SnapshotInvalid(f"snapshot's '{name}' is out of range")
    return value


def _any(arrays: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    array = arrays.get(name)
    return () if array is None else array.shape[:1]


def _kept_positions(memory: MemoryConfig, plan: WindowPlan, position: int) -> np.ndarray:
    """Positions whose memory keys a later write can still need."""
    assert plan.window is not None
    kept = (plan.window + plan.update) * PAGE + memory.max_omega_window
    return np.arange(max(0, position - kept), position)


def _row_arrays(layout: Layout, plan: WindowPlan, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    row = to_host(checkpoint.row)
    context, memory = row.context, row.memory
    assert memory is not None
    ring = plan.ring((checkpoint.page + 1) * PAGE)
    out: dict[str, np.ndarray] = {
        "page": np.asarray(context.page)[0, :ring],
        "weights": np.asarray(memory.weights)[0],
        "read_values": np.asarray(memory.read_values)[0],
        "read_scale": np.asarray(memory.read_scale)[0],
        "seen": np.packbits(np.asarray(memory.seen)[0].astype(bool)),
        "loss": np.asarray(memory.loss),
        "recent": np.asarray(memory.recent)[0],
    }
    momentum = np.asarray(memory.momentum)[0]
    if momentum.any():
        out["momentum"] = momentum
    kept = _kept_positions(layout.memory, plan, checkpoint.position)
    slots = kept % layout.memory.ring
    out["keys"], out["tokens"] = np.asarray(memory.keys)[0, slots], np.asarray(memory.tokens)[0, slots]
    for index, layer in enumerate(context.kv):
        for name, pages in (("k", layer.k), ("v", layer.v)):
            if isinstance(pages, QuantPages):
                out[f"{index}.{name}"] = np.asarray(pages.values)[0, :ring]
                out[f"{index}.{name}.scale"] = np.asarray(pages.scale)[0, :ring]
            else:
                out[f"{index}.{name}"] = np.asarray(pages)[0, :ring]
        out[f"{index}.sink_k"], out[f"{index}.sink_v"] = np.asarray(layer.sink_k)[0], np.asarray(layer.sink_v)[0]
    return out


def _row(layout: Layout, plan: WindowPlan, position: int, page: int, arrays: Mapping[str, np.ndarray]) -> Sequences:
    """Rebuilds a row on the host; every array is checked against the shape this engine would have made."""
    model, config = layout.model, layout.memory
    ring = plan.ring((page + 1) * PAGE)

    def take(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return snapshot.check_array(name, arrays.get(name), shape, np.dtype(dtype))

    def pages(name: str) -> Pages:
        shape = (ring, model.kv_heads, PAGE, model.head_dim)
        if layout.kv_dtype == "float32":
            return take(name, shape, "f4")[None]  # type: ignore[return-value]
        values, scale = take(name, shape, "i1"), take(f"{name}.scale", shape[:-1], "f4")
        return QuantPages(values[None], scale[None])  # type: ignore[arg-type]

    def sink(name: str) -> np.ndarray:
        return take(name, (model.kv_heads, SINKS, model.head_dim), "f4")[None]

    kv = tuple(
        LayerKV(pages(f"{i}.k"), pages(f"{i}.v"), sink(f"{i}.sink_k"), sink(f"{i}.sink_v"))  # type: ignore[arg-type]
        for i in range(len(model.layers))
    )
    numbers = take("page", (ring,), "i4")
    expected = np.full(ring, -1, np.int32)
    for number in range(max(0, page - ring + 1), page + 1):
        expected[plan.slot(number)] = number
    if not np.array_equal(numbers, expected):
        raise SnapshotInvalid("snapshot's pages do not add up")
    kept = _kept_positions(config, plan, position)
    keys = np.zeros((1, config.ring, config.key_size), np.float32)
    tokens = np.zeros((1, config.ring), np.int32)
    keys[0, kept % config.ring] = take("keys", (len(kept), config.key_size), "f4")
    tokens[0, kept % config.ring] = take("tokens", (len(kept),), "i4")
    if not ((tokens >= 0) & (tokens < model.vocab)).all():
        raise SnapshotInvalid("snapshot's tokens are out of range")
    shape = (config.code_dim, config.features)
    momentum = take("momentum", shape, "f4") if "momentum" in arrays else np.zeros(shape, np.float32)
    seen = np.unpackbits(take("seen", (-(-model.vocab // 8),), "u1"))[: model.vocab].astype(np.int8)
    context = Context(
        kv=kv,
        page=numbers[None],  # type: ignore[arg-type]
        slot=np.asarray([plan.slot(max(page, 0))], np.int32),  # type: ignore[arg-type]
        first_page=np.asarray([plan.left(max(page, 0))], np.int32),  # type: ignore[arg-type]
        position=np.asarray([position], np.int32),  # type: ignore[arg-type]
    )
    memory = MemoryState(
        weights=take("weights", shape, "f4")[None],  # type: ignore[arg-type]
        momentum=momentum[None],  # type: ignore[arg-type]
        read_values=take("read_values", shape, "i1")[None],  # type: ignore[arg-type]
        read_scale=take("read_scale", shape[:1], "f4")[None],  # type: ignore[arg-type]
        recent=take("recent", (RECENT, config.components), "f4")[None],  # type: ignore[arg-type]
        keys=keys,  # type: ignore[arg-type]
        tokens=tokens,  # type: ignore[arg-type]
        seen=seen[None],  # type: ignore[arg-type]
        loss=take("loss", (1,), "f4"),  # type: ignore[arg-type]
        written=np.asarray([seen.any()]),  # type: ignore[arg-type]
    )
    return Sequences(context, memory)
