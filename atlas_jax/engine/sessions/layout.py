"""How the state of a session becomes arrays, and what a snapshot must have in common with the engine that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from atlas_jax.engine.api import MemoryInfo, SnapshotInvalid, StateBytes
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.sessions.lora import check_loaded
from atlas_jax.engine.sessions.session import Checkpoint, Session, SessionShape
from atlas_jax.engine.sessions.snapshot import Head

BOUND = {"model": "model", "memory": "memory configuration", "adapter": "memory adapter", "kv_dtype": "cache type"}
"""What a snapshot is bound to, by the header's key."""


class Layout(Protocol):
    """What a snapshot must match to be loaded by an engine, and how the state of its sessions becomes arrays."""

    @property
    def fingerprint(self) -> str:
        """Identifies the model."""

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def default_shape(self) -> SessionShape:
        """Shape of a session that has read nothing yet; its first request replaces it."""

    @property
    def capacity(self) -> int:
        """Independent pairs that one session's memory can hold."""

    @property
    def largest_window(self) -> int:
        """Tokens of the largest window this engine has room for."""

    @property
    def largest_snapshot(self) -> int:
        """Bytes of the largest snapshot this engine could write, a little rounded up."""

    @property
    def lora(self) -> tuple[str, ...]:
        """Digests of the LoRA adapters that are loaded."""

    def header(self) -> dict[str, Any]:
        """The part of a snapshot's header that binds it to this engine; its keys are those of `BOUND`."""

    def shape(self, header: Mapping[str, Any]) -> SessionShape:
        """The shape a header describes; raises SnapshotInvalid."""

    def rest(self, shape: SessionShape, checkpoint: Checkpoint) -> Checkpoint:
        """The same state as it rests in host memory; what was never written takes no room there."""

    def arrays(self, shape: SessionShape, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        """A state as arrays."""

    def row(self, shape: SessionShape, position: int, page: int, arrays: Mapping[str, np.ndarray]) -> Sequences:
        """The state again, on the host; raises SnapshotInvalid for an array this engine would not have made."""

    def state_bytes(self, ring: int, kept: int, budget: int) -> StateBytes:
        """What the parts of a session take; nothing where it is not known yet how many tokens its window has room for.

        Args:
          ring: tokens its window has room for.
          kept: the most pairs it keeps.
          budget: bytes that its parts had to fit into.
        """

    def describe(self, sessions: list[Session]) -> MemoryInfo:
        """What the memories of some sessions hold, together."""


def check_bound(layout: Layout, head: Head) -> None:
    """Raises SnapshotInvalid for a snapshot that another model, memory, cache type or adapter of LoRA has made."""
    for name, wanted in layout.header().items():
        if head.bound.get(name) != wanted:
            raise SnapshotInvalid(f"snapshot was made with another {BOUND[name]}")
    check_loaded(head.listing.lora, layout.lora)
    if head.listing.window > layout.largest_window:
        raise SnapshotInvalid(f"snapshot's window of {head.listing.window} tokens exceeds this server's largest")


def integer(header: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """A whole number of a header; raises SnapshotInvalid where it is none or out of range."""
    value = header[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SnapshotInvalid(f"snapshot's '{name}' is out of range")
    return value
