"""What serves requests: a model in one form, with its memory or without, its sessions, its scheduler and its warm-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from atlas_jax.engine.api import ModelInfo
from atlas_jax.engine.config import EngineConfig
from atlas_jax.engine.loader import Opened
from atlas_jax.engine.runner.base import ModelRunner
from atlas_jax.engine.runner.warmup import WarmUp
from atlas_jax.engine.scheduler.scheduler import Scheduler
from atlas_jax.engine.sessions.budgets import Budgets
from atlas_jax.engine.sessions.documents import Documents
from atlas_jax.engine.sessions.store import Storage
from atlas_jax.engine.sessions.table import SessionTable

log = logging.getLogger("atlas.engine")
_UNBOUNDED = 1 << 62


@dataclass(frozen=True)
class Serving:
    """One form of an engine's model; an engine whose memory is fitted later goes on with another."""

    info: ModelInfo
    runner: ModelRunner
    table: SessionTable | None
    scheduler: Scheduler
    warm_up: WarmUp

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        opened: Opened,
        storage: Storage | None,
        documents: Documents,
        wake: Callable[[], None],
    ) -> Serving:
        """Makes it; nothing runs yet.

        Args:
          storage: where its sessions are kept, if it has any.
          wake: is called when a session is free.
        """
        # in an object store room is the operator's affair: this process knows its own share of what lies there
        shared = storage is not None and storage.shared
        disk = _UNBOUNDED if shared else config.l3_cache_size
        sync_seconds = (0.0 if shared else 1.0) if config.journal_sync is None else config.journal_sync
        table = (
            None
            if opened.layout is None
            else SessionTable(
                opened.layout,
                storage=storage,
                documents=documents,
                default_file=config.memory_file or f"{opened.info.name}_memory.atlas",
                budgets=Budgets(config.l1_cache_size, config.l2_cache_size, disk, config.owner_quota),
                on_idle=wake,
                sync_seconds=sync_seconds,
            )
        )
        scheduler = Scheduler(
            opened.runner,
            opened.tokenizer,
            None if table is None else table.tiers,
            max_rows=config.max_concurrent,
            context=opened.longest_prompt,
            answer=opened.info.context_length,
            prefix_bytes=config.prefix_cache_size,
        )
        warm_up = WarmUp(opened.runner, lambda: bool(scheduler.running or scheduler.waiting))
        return cls(opened.info, opened.runner, table, scheduler, warm_up)

    def start(self) -> None:
        """Compiles what one client needs, and serves; the rest is compiled in the background."""
        self.warm_up.start(first_pages=self.runner.buckets.pages[0])
        self.scheduler.start()

    @property
    def busy(self) -> bool:
        """Whether there are requests."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def end(self, timeout: float) -> None:
        """Ends what still runs, keeping its sessions, within `timeout` seconds; idempotent."""
        until = time.monotonic() + timeout
        if not self.scheduler.stop(timeout):
            log.error("The engine's thread did not end within %.0f s", timeout)
        if self.table is not None:
            self.table.close(max(until - time.monotonic(), 0.0))
        self.warm_up.stop(max(until - time.monotonic(), 0.0))
