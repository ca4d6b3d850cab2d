"""Sessions taken from a folder and put into one without the model they belong to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from atlas_jax.engine.api import MemoryInfo, SessionKey, SnapshotInvalid, StateBytes
from atlas_jax.engine.sessions import files, snapshot
from atlas_jax.engine.sessions.codec import decode_session, encode_session
from atlas_jax.engine.sessions.folder_store import FolderStore
from atlas_jax.engine.sessions.layout import integer
from atlas_jax.engine.sessions.lora import read_lora
from atlas_jax.engine.sessions.offline import StoredSession, again
from atlas_jax.engine.sessions.replay import replay
from atlas_jax.engine.sessions.session import Checkpoint, Session, SessionShape
from atlas_jax.engine.sessions.snapshot import Head, Listing
from atlas_jax.model.page_schedule import PageSchedule

_TEXT = frozenset({"history.tail", "history.digests", "unread"})
"""Arrays of a snapshot that are no part of its state."""


def whole_snapshot(stored: StoredSession) -> tuple[Listing, bytes]:
    """A session as one snapshot: what its journal has beyond the one that is stored is in it as text that is to be read.

    Raises:
      SnapshotInvalid: it is damaged, or has a journal alone, whose model's memory is not known.
      OSError: it cannot be read.
    """

    def read() -> tuple[Head, bytes]:
        path = stored.snapshot
        if path is None:
            raise SnapshotInvalid("it has a journal and no snapshot yet: a server that has stopped in order leaves one")
        data = files.read_file(path, None)
        snapshot.decode(data)
        generation = int(path.name.partition(".")[0])
        head, _ = snapshot.read_head(data)
        return snapshot.with_generation(head, generation), data

    head, data = again(read)
    if stored.journal is None:
        return head.listing, data
    layout = _AnyLayout(head)
    session = replay(layout, decode_session(layout, data, head.listing.generation), stored.journal.turns)
    made = encode_session(layout, session)
    return snapshot.read_head(made)[0].listing, made


def put(store: FolderStore, owner: str, data: bytes, *, replace: bool = False) -> bool:
    """Stores a snapshot as the present state of an owner's session; False where a newer one is there.

    Args:
      store: of the snapshot's model, in a folder that this process has taken.
      replace: whether it takes the place of a newer one, too.

    Raises:
      SnapshotInvalid: it is damaged.
      StorageFull, OSError: nothing was changed.
    """
    head, _, _ = snapshot.decode(data)
    place = store.session(SessionKey(owner, head.listing.session_id))
    try:
        turns = place.read_journal()
        newest = max(place.generation, turns.turns[-1].generation if turns is not None and turns.turns else 0)
    except SnapshotInvalid:  # what is there is damaged, and this is not
        newest = place.generation
    newest = max(newest, place.deleted)
    if head.listing.generation <= newest and not replace:
        return False
    generation = max(time.time_ns() // 1000, newest + 1, head.listing.generation)
    listing = msgspec.structs.replace(head.listing, owner=owner, generation=generation)
    return place.write(generation, snapshot.with_listing(data, listing))


@dataclass(frozen=True)
class _AnyLayout:
    """A layout that takes a snapshot for what it says it is; its state stays as it was stored."""

    head: Head
    vocab: int = 1 << 31

    @property
    def fingerprint(self) -> str:
        return str(self.head.bound.get("model", ""))

    @property
    def default_shape(self) -> SessionShape:
        raise NotImplementedError

    @property
    def capacity(self) -> int:
        return 0

    @property
    def largest_window(self) -> int:
        return self.head.listing.window

    @property
    def largest_snapshot(self) -> int:
        return 1 << 62

    @property
    def lora(self) -> tuple[str, ...]:
        return self.head.listing.lora

    def header(self) -> dict[str, Any]:
        return self.head.bound

    def shape(self, header: Mapping[str, Any]) -> SessionShape:
        window = None if header["window"] is None else integer(header, "window", 1, 1 << 20)
        return SessionShape(
            PageSchedule(window, integer(header, "update", 1, 1 << 20)),
            integer(header, "layers", 1, 1 << 10),
            integer(header, "degree", 1, 3),
            integer(header, "kept", 0, 1 << 20),
            integer(header, "budget", 0, 1 << 50),
            lora=read_lora(header),
        )

    def rest(self, shape: SessionShape, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint

    def arrays(self, shape: SessionShape, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        row: Any = checkpoint.row
        return dict(row)

    def row(self, shape: SessionShape, position: int, page: int, arrays: Mapping[str, np.ndarray]) -> Any:
        return {name: array for name, array in arrays.items() if name not in _TEXT}

    def state_bytes(self, ring: int, kept: int, budget: int) -> StateBytes:
        return StateBytes()

    def describe(self, sessions: list[Session]) -> MemoryInfo:
        raise NotImplementedError
