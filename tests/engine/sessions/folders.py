"""Folders of sessions as a server leaves them, made without one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import SessionKey
from atlas_jax.engine.sessions import snapshot
from atlas_jax.engine.sessions.folder_session import FolderSession
from atlas_jax.engine.sessions.folder_store import MemoryFolder
from atlas_jax.engine.sessions.history import History
from atlas_jax.engine.sessions.journal import Origin, Reading, Turn
from atlas_jax.engine.sessions.snapshot import Listing

MODEL = "ab" * 32
READING = Reading(
    window=4,
    update=1,
    layers=1,
    degree=2,
    kept=256,
    budget=1 << 24,
    optimizer="exact",
    omega_window=512,
    step=0.001,
    decay=0.9,
)


def made(
    name: str, *, owner: str = "local", model: str = MODEL, generation: int = 1000, tokens: int = 3, **more: Any
) -> bytes:
    """A snapshot of a session that has read some tokens."""
    history = History()
    history.extend(list(range(tokens)))
    header = {
        "window": 4,
        "update": 1,
        "layers": 1,
        "degree": 2,
        "kept": 256,
        "budget": 1 << 24,
        "length": tokens,
        "first_reply": None,
        "replies": [],
        "preamble": None,
        "unread": [],
        "pending": None,
        "updates": 0,
        "muon_iterations": 0,
        "omega_loss": 0.0,
        "last_update": None,
        "state": None,
        "has_state": False,
        "position": tokens,
        "page": tokens // PAGE,
        "absorbed": 0,
    }
    arrays = {
        "history.tail": np.asarray(history.tail, np.int32),
        "history.digests": np.frombuffer(b"".join(history.digests), np.uint8),
        "unread": np.zeros(0, np.int32),
        "0.k": np.arange(12, dtype=np.float32).reshape(3, 4),
    }
    listing = Listing(
        owner=owner,
        session_id=name,
        generation=generation,
        tokens=tokens,
        floor=more.pop("floor", 0),
        bytes=1000,
        created=1_700_000_000.0,
        last_used=more.pop("last_used", time.time()),
        has_state=False,
        window=512,
        window_fill=tokens,
        **more,
    )
    return snapshot.encode(listing, {"model": model, "memory": [1], "adapter": "x", "kv_dtype": "int8"}, header, arrays)


def put(
    root: Path,
    name: str,
    *,
    owner: str = "local",
    model: str = MODEL,
    generation: int = 1000,
    turns: Sequence[Sequence[int]] = (),
    saved: bool = False,
    **more: Any,
) -> FolderSession:
    """Stores a session; each of `turns` goes on from it in its journal. Generation 0 stores a journal alone."""
    folder = MemoryFolder(root)
    try:
        place = folder.store(model).session(SessionKey(owner, name))
        if generation:
            assert place.write(generation, made(name, owner=owner, model=model, generation=generation, **more))
        if saved:
            place.keep()
        length = more.get("tokens", 3) if generation else 0
        for number, tokens in enumerate(turns, 1):
            turn = Turn(
                generation=generation + number,
                after=generation + number - 1,
                keep=length,
                tokens=list(tokens),
                replies=[(length + 1, length + len(tokens))],
                preamble=None,
                pending=7,
                reading=READING,
                time=more.get("last_used", time.time()),
            )
            assert place.append(Origin(model, owner, name, 1_700_000_000.0), turn)
            length += len(tokens)
        return place
    finally:
        folder.close()
