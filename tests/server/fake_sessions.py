"""The fake engine's sessions: a dict of token lists, saved as JSON."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas_jax.engine.api import (
    LayerMemoryInfo,
    MemoryInfo,
    SaveResult,
    SessionExists,
    SessionInfo,
    SessionNotFound,
    SetAside,
    StateBytes,
    StoredFile,
)

_STATE = StateBytes(window=500, kept=400, memory=124, budget=1 << 24)


@dataclass
class Session:
    tokens: list[int] = field(default_factory=list)
    state: Any = None
    has_state: bool = False
    created: float = field(default_factory=time.time)


class FakeDocuments:
    """Documents in a dict."""

    shared = False

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], bytes] = {}
        self.written: dict[str, float] = {}
        self.fail: list[Exception] = []

    def list(self, owner: str) -> tuple[StoredFile, ...]:
        own = sorted((name, data) for (who, name), data in self.kept.items() if who == owner)
        return tuple(
            StoredFile(filename=name, bytes=len(data), modified=self.written.get(name, 0.0)) for name, data in own
        )

    def read(self, owner: str, name: str) -> bytes | None:
        return self.kept.get((owner, name))

    def write(self, owner: str, name: str, data: bytes) -> None:
        if self.fail:
            raise self.fail.pop(0)
        self.kept[owner, name] = data
        self.written[name] = time.time()

    def delete(self, owner: str, name: str) -> None:
        self.kept.pop((owner, name), None)


class FakeSessions:
    """Sessions in a dict; files in a folder if there is one, else in another dict."""

    def __init__(self, root: Path | None, model: str) -> None:
        self.root, self.default = root, f"{model}_memory.atlas"
        self.live: dict[tuple[str, str], Session] = {}
        self.files_of: dict[tuple[str, str], str] = {}
        self.aside: dict[str, list[SetAside]] = {}
        self.expired: list[float] = []
        self.saves = self.loads = 0
        self.fail: list[Exception] = []
        self.forks: list[tuple[str, str, str]] = []
        self.busy: dict[str, threading.Event] = {}  # sessions that a request is using, until the event is set

    def _check(self) -> None:
        if self.fail:
            raise self.fail.pop(0)

    def _get(self, owner: str, session_id: str) -> Session:
        if (owner, session_id) not in self.live:
            raise SessionNotFound(f"No session '{session_id}'")
        return self.live[owner, session_id]

    def _of(self, owner: str) -> dict[str, Session]:
        return {sid: one for (who, sid), one in sorted(self.live.items()) if who == owner}

    def info(self, owner: str, session_id: str | None) -> MemoryInfo:
        self._check()
        found = [self._get(owner, session_id)] if session_id is not None else list(self._of(owner).values())
        used = sum(len(one.tokens) for one in found)
        return MemoryInfo(
            window_size=512,
            window_fill=min(used, 512),
            kept_pairs=min(used, 768),
            kept_pairs_capacity=768,
            state=_STATE,
            memory_capacity=1000,
            memory_used=used,
            total_updates=used // 128,
            last_update_time=None,
            layers=(LayerMemoryInfo(layer=27, taps=(27, 24), norm=1.5, effective_rank=2.5, omega_loss=0.25),),
        )

    def list(self, owner: str, *, after: str | None, limit: int) -> tuple[tuple[SessionInfo, ...], str | None]:
        self._check()
        names = [sid for sid in self._of(owner) if after is None or sid > after]
        rows = tuple(
            SessionInfo(
                session_id=sid,
                tokens=len(self.live[owner, sid].tokens),
                bytes=100,
                window_size=512,
                window_fill=7,
                kept_pairs=5,
                kept_pairs_capacity=768,
                state=_STATE,
                created=1.0,
                last_used=2.0,
                resident="host",
                has_state=self.live[owner, sid].has_state,
            )
            for sid in names[:limit]
        )
        return rows, rows[-1].session_id if len(names) > limit else None

    def files(self, owner: str) -> tuple[StoredFile, ...]:
        self._check()
        found = {name: len(text) for (who, name), text in self.files_of.items() if who == owner}
        if self.root is not None and self.root.is_dir():
            found = {path.name.removeprefix(f"{owner}-"): path.stat().st_size for path in self.root.glob(f"{owner}-*")}
        return tuple(StoredFile(filename=name, bytes=size, modified=3.0) for name, size in sorted(found.items()))

    def delete_file(self, owner: str, filename: str) -> None:
        self._check()
        if self.files_of.pop((owner, filename), None) is None:
            raise SessionNotFound("No such file")

    def set_aside(self, owner: str) -> tuple[SetAside, ...]:
        return tuple(self.aside.get(owner, ()))

    def save_changed(self, *, timeout: float | None = None) -> int:
        self._check()
        return 0

    def save_default(self, owner: str, *, timeout: float | None = None) -> SaveResult | None:
        return self.save_all(owner, None)

    def load_default(self, owner: str) -> int | None:
        try:
            return self.load_file(owner, self.default)
        except SessionNotFound:
            return None

    def expire(self, idle: float) -> int:
        self._check()
        self.expired.append(idle)
        return 0

    def _write(self, owner: str, filename: str, names: Sequence[str], session_id: str | None) -> SaveResult:
        text = json.dumps({sid: [self.live[owner, sid].tokens, self.live[owner, sid].state] for sid in names})
        if self.root is None:
            self.files_of[owner, filename] = text
        else:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / f"{owner}-{filename}").write_text(text)
        self.saves += 1
        return SaveResult(
            filename=filename, session_id=session_id, bytes=len(text), sessions=len(names), timestamp=time.time()
        )

    def save_all(self, owner: str, filename: str | None) -> SaveResult:
        self._check()
        return self._write(owner, filename or self.default, list(self._of(owner)), None)

    def save_session(self, owner: str, session_id: str) -> SaveResult:
        self._check()
        self._get(owner, session_id)
        return self._write(owner, f"{session_id}.atlas", [session_id], session_id)

    def save_context(self, owner: str, context_id: str, state: Any) -> SaveResult:
        self._check()
        session = self.live.setdefault((owner, context_id), Session())
        session.state, session.has_state = state, True
        return self._write(owner, f"{context_id}.atlas", [context_id], context_id)

    def load_file(self, owner: str, filename: str) -> int:
        self._check()
        if self.root is None:
            text = self.files_of.get((owner, filename))
        else:
            path = self.root / f"{owner}-{filename}"
            text = path.read_text() if path.exists() else None
        if text is None:
            raise SessionNotFound(f"No snapshot '{filename}'")
        for sid, (tokens, state) in json.loads(text).items():
            self.live[owner, sid] = Session(tokens=tokens, state=state)
        self.loads += 1
        return len(json.loads(text))

    def load_context(self, owner: str, context_id: str) -> Any:
        self._check()
        self.loads += 1
        return self._get(owner, context_id).state

    def reset(self, owner: str, session_id: str | None) -> int:
        self._check()
        names = [session_id] if session_id is not None else list(self._of(owner))
        for name in names:
            if name in self.busy:
                self.busy[name].wait(30)
        for name in names:
            self._get(owner, name).tokens = []
        return len(names)

    def fork(self, owner: str, source: str, target: str) -> bool:
        self.forks.append((owner, source, target))
        found = self.live.get((owner, source))
        if found is None or (owner, target) in self.live:
            return False
        self.live[owner, target] = Session(tokens=list(found.tokens))
        return True

    def rename(self, owner: str, source: str, target: str) -> None:
        self._check()
        found = self._get(owner, source)
        if (owner, target) in self.live:
            raise SessionExists("A session of that name exists already")
        self.live[owner, target] = found
        del self.live[owner, source]

    def delete(self, owner: str, session_id: str) -> None:
        self._check()
        self._get(owner, session_id)
        del self.live[owner, session_id]
