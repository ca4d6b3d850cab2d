"""What sessions may take of the device, of host memory and of the disk, and what they do take."""

from __future__ import annotations

from dataclasses import dataclass

from atlas_jax.engine.api import StorageFull
from atlas_jax.engine.sessions.entry import Entry, Tier


@dataclass(frozen=True)
class Budgets:
    """Bytes of session state.

    Attributes:
      device, host, disk: what each tier may hold. 0 for the device: sessions rest in host memory.
      owner: what one owner may have on disk; None is all of it.
    """

    device: int
    host: int
    disk: int
    owner: int | None = None


class Usage:
    """Bytes that sessions and exports take, by tier and by owner; not thread-safe."""

    def __init__(self, budgets: Budgets) -> None:
        self.budgets = budgets
        self._tiers: dict[Tier, int] = {"device": 0, "host": 0, "disk": 0}
        self._owners: dict[str, int] = {}
        self._exports: dict[str, int] = {}
        self._documents: dict[str, int] = {}

    def count(self, entry: Entry) -> None:
        """Counts an entry as it is now: what it takes of its tier, and of its owner's share of the disk."""
        resting = (entry.tier, 0 if entry.session is None else entry.session.size)
        self._tiers[entry.resting[0]] -= entry.resting[1]
        self._tiers[resting[0]] += resting[1]
        entry.resting = resting
        charged = entry.stored_bytes
        if entry.session is not None and not entry.is_clean:  # what it will take once it is written
            last = entry.session.checkpoints[-1].bytes if entry.session.checkpoints else 0
            charged = max(charged, last + len(entry.session.state or b""))
        owner = entry.key.owner
        self._owners[owner] = self._owners.get(owner, 0) + charged - entry.charged
        entry.charged = charged

    def drop(self, entry: Entry) -> None:
        """Counts an entry no more."""
        self._tiers[entry.resting[0]] -= entry.resting[1]
        self._owners[entry.key.owner] = self._owners.get(entry.key.owner, 0) - entry.charged
        entry.resting, entry.charged = ("host", 0), 0

    def count_exports(self, owner: str, size: int) -> None:
        """Counts an owner's exports as they are now."""
        self._exports[owner] = size

    def count_documents(self, owner: str, size: int) -> None:
        """Counts an owner's documents as they are now."""
        self._documents[owner] = size

    def in_memory(self) -> int:
        """Bytes that sessions take of the device and of host memory together."""
        return self._tiers["device"] + self._tiers["host"]

    def device_excess(self) -> int:
        """Bytes by which the device's tier is over its budget."""
        return self._tiers["device"] - self.budgets.device

    def host_excess(self) -> int:
        """Bytes by which host memory's tier is over its budget."""
        return self._tiers["host"] - self.budgets.host

    def on_disk(self, owner: str | None = None) -> int:
        """Bytes of disk that an owner's sessions, exports and documents take, or everyone's, written or not yet."""
        parts = self._owners, self._exports, self._documents
        return sum(sum(part.values()) if owner is None else part.get(owner, 0) for part in parts)

    def check_disk(self, owner: str, more: int = 1) -> None:
        """Raises StorageFull where an owner, or everyone together, has no room on disk for `more` bytes."""
        if more <= 0:
            return
        budgets = self.budgets
        if self.on_disk() + more > budgets.disk:
            raise StorageFull("The disk budget of session snapshots is used up")
        share = budgets.disk if budgets.owner is None else budgets.owner
        if self.on_disk(owner) + more > share:
            raise StorageFull("This owner's share of the disk is used up: delete sessions or files to make room")
