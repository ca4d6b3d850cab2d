"""The server under attack: three owners with a key each, sessions that must outlive everything, and its memory watched."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server_process import Server

ATTACKER, VICTIM, NEIGHBOUR, COMPANION = OWNERS = ("mallory", "victor", "nina", "carl")
SECRET = "zirconium-4711"
"""Part of what the victim's sessions hold; nobody else may ever see it."""
MEMORY = {"window_size": 128, "update_frequency": 128, "omega_window": 128}
"""The smallest memory, which little text overflows."""
CEILING_MIB = 6144.0
"""A server that grows by more than this is ended: the attack has succeeded, and the machine is to live on."""
_SESSIONS = ("planted-a", "planted-b", "planted-c")
_PATIENCE = 120.0


def key_of(owner: str) -> str:
    """The API key of an owner."""
    return f"key-of-{owner}"


def prose(subject: str, words: int) -> str:
    """Words that depend on the subject."""
    return " ".join(f"{subject} {number * 7 % 31}" for number in range(words // 2))


class Target(Server):
    """A server whose owners are those of `OWNERS`, or, without `keys`, the one of an open server.

    Attributes:
      folder: of its files; the sessions lie in `memory` there.
      peak: its most memory so far, in MiB.
      burst: whether it was ended because it had passed the ceiling.
    """

    def __init__(self, model: Path, folder: Path, flags: Sequence[str] = (), *, keys: bool = True, **rest: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.memory, self.keys = folder, folder / "memory", keys
        self.name = model.name.removesuffix(".gguf")
        if keys:
            file = folder / "keys"
            file.write_text("".join(f"{key_of(owner)}:{owner}\n" for owner in OWNERS))
            file.chmod(0o600)
            flags = (*flags, "--api-keys-file", str(file))
        self.planted: dict[tuple[str, str], int] = {}
        self._clients: list[httpx.Client] = []
        super().__init__(model, folder, flags, **rest)
        self.base = self.peak = self.resident
        self.burst = False
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._watch_memory, daemon=True)
        self._watch.start()

    def _watch_memory(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, resident := self.resident)
            if resident > self.base + CEILING_MIB:
                self.burst = True
                self.process.kill()
                return

    def rest(self) -> None:
        """Waits until every program is compiled and nothing runs; the memory of now is what attacks are measured from."""
        self.wait_for(r"(Every program is compiled)")
        self.wait_idle()
        self.base = self.peak = self.resident

    def wait_idle(self, patience: float = _PATIENCE) -> bool:
        """Waits until nothing runs or waits; whether that was so in time."""
        end = time.monotonic() + patience
        with self.client(VICTIM, timeout=10) as http:
            while time.monotonic() < end and self.alive:
                try:
                    lines = dict(
                        line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[:1] != "#"
                    )
                    if not any(float(lines[f"atlas_{x}"]) for x in ("num_requests_running", "contexts_in_use")):
                        return True
                except (httpx.HTTPError, KeyError, ValueError):
                    pass
                time.sleep(0.1)
        return False

    def client(self, owner: str, timeout: float = _PATIENCE) -> httpx.Client:
        """A client with the owner's key."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        return httpx.Client(base_url=self.url, timeout=timeout, headers=headers_of(owner), limits=limits)

    def post(self, owner: str, path: str, body: Any = None, timeout: float = _PATIENCE) -> httpx.Response:
        """One request of an owner on a connection of its own."""
        with self.client(owner, timeout) as http:
            return http.post(path, json={} if body is None else body)

    def say(
        self, owner: str, session: str | None, text: str, timeout: float = _PATIENCE, **more: Any
    ) -> httpx.Response:
        """A short greedy chat, in a session or without one."""
        body = {"model": self.name, "messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
        memory = {} if session is None else {"atlas": {"session_id": session, **MEMORY}}
        return self.post(owner, "/v1/chat/completions", {**body, **memory, **more}, timeout)

    def contexts(self, owner: str) -> dict[str, Mapping[str, Any]]:
        """An owner's sessions by name, with every page of the list."""
        rows: dict[str, Mapping[str, Any]] = {}
        after: str | None = None
        while True:
            body = {"limit": 1000} | ({} if after is None else {"after": after})
            response = self.post(owner, "/v1/atlas/memory/list", body)
            response.raise_for_status()
            page = response.json()
            rows |= {row["context_id"]: row for row in page["contexts"]}
            after = page["next"]
            if after is None:
                return rows

    def plant(self) -> None:
        """Gives the victim sessions, and saves them."""
        for session in _SESSIONS:
            self.say(VICTIM, session, f"The word is {SECRET}. {prose(session, 200)}").raise_for_status()
        self.post(VICTIM, "/v1/atlas/memory/save").raise_for_status()
        self.planted = {(VICTIM, name): row["tokens"] for name, row in self.contexts(VICTIM).items()}

    def lost(self, planted: Mapping[tuple[str, str], int] | None = None) -> list[str]:
        """Which planted sessions are gone or shorter."""
        out = []
        planted = self.planted if planted is None else planted
        found = {owner: self.contexts(owner) for owner in {owner for owner, _ in planted}}
        for (owner, session), tokens in planted.items():
            row = found[owner].get(session)
            if row is None:
                out.append(f"session {session} is gone")
            elif row["tokens"] < tokens:
                out.append(f"session {session} has {row['tokens']} tokens of {tokens}")
        return out

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        if hasattr(self, "_done"):
            self._done.set()
        super().kill()

    def files(self) -> list[Path]:
        """What lies in its memory folder."""
        return sorted(path for path in self.memory.rglob("*") if path.is_file())


def headers_of(owner: str) -> dict[str, str]:
    """The header that carries the owner's key."""
    return {"Authorization": f"Bearer {key_of(owner)}"}
