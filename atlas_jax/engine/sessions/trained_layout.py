"""Snapshots of sessions of a trained model: every array of its state under the name of its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from atlas_jax.aot import shapes
from atlas_jax.engine.api import LayerMemoryInfo, MemoryInfo, SnapshotInvalid, StateBytes
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.runner.trained import capacity, session_shape, window
from atlas_jax.engine.sessions import snapshot
from atlas_jax.engine.sessions.host_arrays import to_host, to_numpy
from atlas_jax.engine.sessions.info import norm_and_rank, summary
from atlas_jax.engine.sessions.session import Checkpoint, Session, SessionShape
from atlas_jax.memory import MemoryState
from atlas_jax.model.lm.config import LMConfig


@dataclass(frozen=True)
class TrainedLayout:
    """Implements `layout.Layout` for a trained model.

    Attributes:
      state: shapes and types of a row's state.
    """

    config: LMConfig
    state: Any
    fingerprint: str

    @classmethod
    def of(cls, config: LMConfig, row: Sequences, fingerprint: str) -> TrainedLayout:
        """The layout of sessions that are rows like this one."""
        return cls(config, shapes(row.cache), fingerprint)

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.config.vocab

    @property
    def default_shape(self) -> SessionShape:
        """Shape of every session."""
        return session_shape()

    @property
    def capacity(self) -> int:
        """Independent pairs that one session's memory can hold."""
        return capacity(self.config)

    @property
    def largest_window(self) -> int:
        """Tokens of the largest window this engine has room for."""
        return 0

    @property
    def largest_snapshot(self) -> int:
        """Bytes of the largest snapshot this engine could write, a little rounded up."""
        return self._bytes + (16 << 20)

    @property
    def _bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.state))

    @property
    def lora(self) -> tuple[str, ...]:
        """None: LoRA adapters are pretrained models'."""
        return ()

    def header(self) -> dict[str, Any]:
        """The part of a snapshot's header that binds it to this engine. What it has room for is part of its shapes."""
        return {"model": self.fingerprint, "memory": self.config.pattern, "adapter": None, "kv_dtype": "float32"}

    def shape(self, header: Mapping[str, Any]) -> SessionShape:
        """The shape of every session."""
        return session_shape()

    def rest(self, shape: SessionShape, checkpoint: Checkpoint) -> Checkpoint:
        """The same state in host memory."""
        return replace(checkpoint, row=to_host(checkpoint.row))

    def arrays(self, shape: SessionShape, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        """A state as arrays, by place."""
        leaves = jax.tree_util.tree_leaves_with_path(to_numpy(checkpoint.row).cache)
        return {_name(path): leaf for path, leaf in leaves}

    def row(self, shape: SessionShape, position: int, page: int, arrays: Mapping[str, np.ndarray]) -> Sequences:
        """The state again, on the host; raises SnapshotInvalid for an array this engine would not have made."""

        def take(path: Any, leaf: Any) -> np.ndarray:
            name = _name(path)
            array = snapshot.check_array(name, arrays.get(name), leaf.shape, leaf.dtype)
            # a place or a count: nothing of a state lies before the text or after its end
            if array.dtype.kind == "i" and array.size and not (array.min() >= -1 and array.max() <= position):
                raise SnapshotInvalid(f"snapshot's '{name}' is out of range")
            return array

        state = jax.tree_util.tree_map_with_path(take, self.state)
        if state.position[0] != position:
            raise SnapshotInvalid("snapshot's state is not of its position")
        return Sequences(state, None)

    def state_bytes(self, ring: int, kept: int, budget: int) -> StateBytes:
        """All of it is the model's own memory."""
        return StateBytes(memory=self._bytes)

    def describe(self, sessions: list[Session]) -> MemoryInfo:
        """What the memories of some sessions hold, together."""
        return summary(sessions, capacity(self.config), _layers, self.state_bytes, window(self.config))


def _layers(session: Session, checkpoint: Checkpoint) -> list[LayerMemoryInfo]:
    """Of each layer with a memory: Frobenius norm of all its matrices, and the mean of their effective ranks."""
    state: Any = checkpoint.row.cache
    found = []
    for layer, held in enumerate(state.layers):
        nodes = jax.tree.leaves(held, is_leaf=lambda node: isinstance(node, MemoryState))
        memories = [node for node in nodes if isinstance(node, MemoryState)]
        if not memories:
            continue
        weights = memories[-1].weights or {"values": memories[-1].moments["values"]}
        matrices = [m for w in weights.values() for m in np.asarray(w).reshape(-1, *np.shape(w)[-2:])]
        each = [norm_and_rank(matrix) for matrix in matrices]
        norm = float(np.sqrt(sum(n * n for n, _ in each)))
        rank = sum(r for _, r in each) / len(each)
        found.append(LayerMemoryInfo(layer=layer, taps=(layer,), norm=norm, effective_rank=rank, omega_loss=0.0))
    return found


def _name(path: Any) -> str:
    return "state" + jax.tree_util.keystr(path)
