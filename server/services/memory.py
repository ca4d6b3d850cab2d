"""The memory endpoints: what a caller can see of the sessions it owns, and save, load, list, reset and delete."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from msgspec import UNSET

from atlas_jax.engine.api import EngineProtocol, MemoryUnavailable, SessionConflict, SessionStore
from server.config.settings import Settings
from server.errors import NotEnabled, Unavailable
from server.prometheus import Metrics
from server.schemas import atlas as schema
from server.schemas.atlas import state_fields
from server.services.engine_supervisor import EngineSupervisor
from server.services.memory_options import check_name, no_memory
from server.services.runtime_config import RuntimeConfig
from server.services.thread_pools import ThreadPools
from server.validation import invalid

log = logging.getLogger("atlas.server")
T = TypeVar("T")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RESERVED = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\..*)?", re.IGNORECASE)
_RETRY_SECONDS = (0.05, 0.2, 0.8)
_LIST_LIMIT = 100
_SAVE_FAILED = "Failed to save context state"


class MemoryService:
    """Calls the engine's session store in threads, with one file of sessions for every owner."""

    def __init__(
        self,
        supervisor: EngineSupervisor,
        settings: Settings,
        config: RuntimeConfig,
        metrics: Metrics,
        pools: ThreadPools,
    ) -> None:
        self._supervisor, self._config, self._pools = supervisor, config, pools
        self._settings = settings.atlas
        self._metrics = metrics

    @property
    def engine(self) -> EngineProtocol:
        """The engine whose memory it is; raises Unavailable while there is none."""
        return self._supervisor.engine

    @property
    def dim(self) -> int | None:
        """Dimension of the memory that is served; None where it has none."""
        return self.engine.model.memory_dim

    def require(self, *, endpoints: bool = False) -> None:
        """Raises NotEnabled where the operator has turned the memory, or its endpoints, off."""
        if not self._settings.enabled:
            raise NotEnabled("ATLAS not enabled")
        if endpoints and not self._settings.enable_memory_endpoints:
            raise NotEnabled("The memory endpoints are not enabled")

    def _persistent(self) -> None:
        self.require(endpoints=True)
        if not self._settings.memory_persist:
            raise NotEnabled("Memory persistence is not enabled")

    async def info(self, owner: str, session_id: str | None) -> schema.MemoryResponse:
        """State of one session's memory, or totals over the owner's."""
        self.require(endpoints=True)
        if session_id is not None:
            session_id = check_name(session_id, "session_id")
        info = await self._call(lambda store: store.info(owner, session_id))
        return schema.MemoryResponse(
            session_id=session_id,
            window_size=info.window_size,
            window_fill=info.window_fill,
            kept_pairs=info.kept_pairs,
            kept_pairs_capacity=info.kept_pairs_capacity,
            **state_fields(info.state),
            memory_capacity=info.memory_capacity,
            memory_used=info.memory_used,
            total_updates=info.total_updates,
            last_update_time=info.last_update_time,
            layers=[
                schema.LayerMemory(
                    layer=one.layer,
                    taps=list(one.taps),
                    norm=one.norm,
                    effective_rank=one.effective_rank,
                    omega_loss=one.omega_loss,
                )
                for one in info.layers
            ],
        )

    async def save(self, owner: str, wanted: schema.SaveRequest) -> schema.SaveResponse:
        """Saves everything, one session, or a context with the caller's state."""
        self._persistent()
        _one_of(filename=wanted.filename, session_id=wanted.session_id, context_id=wanted.context_id)
        if wanted.context_id is None and wanted.state is not UNSET:
            raise invalid("context_id", "required field is missing")
        with self._metrics.save_seconds.time():
            if wanted.context_id is not None:
                name, state = check_name(wanted.context_id, "context_id"), wanted.state
                if state is UNSET:
                    saved = await self._call(lambda store: store.save_session(owner, name), failure=_SAVE_FAILED)
                else:
                    saved = await self._call(lambda store: store.save_context(owner, name, state), failure=_SAVE_FAILED)
            elif wanted.session_id is not None:
                session = check_name(wanted.session_id, "session_id")
                saved = await self._call(lambda store: store.save_session(owner, session), failure=_SAVE_FAILED)
            else:
                file = _file(wanted.filename) if wanted.filename else None
                saved = await self._call(lambda store: store.save_all(owner, file), failure=_SAVE_FAILED)
        if saved.session_id is None:
            self._tell("[ATLAS] Memory state saved to %s (%d sessions)", saved.filename, saved.sessions)
        else:
            self._tell("[ATLAS] Memory state saved for session: %s", saved.session_id)
        return schema.SaveResponse(
            success=True,
            filename=saved.filename,
            context_id=saved.session_id,
            bytes=saved.bytes,
            timestamp=int(saved.timestamp),
        )

    async def load(self, owner: str, wanted: schema.LoadRequest) -> schema.LoadResponse:
        """Loads a file of sessions, or one context with the caller's state."""
        self._persistent()
        _one_of(filename=wanted.filename, context_id=wanted.context_id)
        now = int(time.time())
        with self._metrics.load_seconds.time():
            if wanted.context_id is not None:
                name = check_name(wanted.context_id, "context_id")
                state = await self._call(lambda store: store.load_context(owner, name))
                self._tell("[ATLAS] Memory state loaded for session: %s", name)
                return schema.LoadResponse(success=True, loaded_at=now, context_id=name, state=state)
            if not wanted.filename:
                raise invalid("filename", "required field is missing")
            file = _file(wanted.filename)
            count = await self._call(lambda store: store.load_file(owner, file))
        self._tell("Loaded ATLAS memory from %s (%d sessions)", file, count)
        return schema.LoadResponse(success=True, loaded_at=now, filename=file)

    async def page(self, owner: str, wanted: schema.ListRequest) -> schema.ListResponse:
        """One page of the owner's contexts."""
        self.require(endpoints=True)
        limit = _LIST_LIMIT if wanted.limit is None else wanted.limit
        rows, following = await self._call(lambda store: store.list(owner, after=wanted.after, limit=limit))
        files = await self._call(lambda store: store.files(owner))
        return schema.ListResponse(
            success=True,
            contexts=[
                schema.ContextRow(
                    context_id=row.session_id,
                    tokens=row.tokens,
                    bytes=row.bytes,
                    window_size=row.window_size,
                    window_fill=row.window_fill,
                    kept_pairs=row.kept_pairs,
                    kept_pairs_capacity=row.kept_pairs_capacity,
                    **state_fields(row.state),
                    created=row.created,
                    last_used=row.last_used,
                    resident=row.resident,
                    has_state=row.has_state,
                )
                for row in rows
            ],
            next=following,
            files=[schema.FileRow(filename=one.filename, bytes=one.bytes, modified=int(one.modified)) for one in files],
        )

    async def delete(self, owner: str, wanted: schema.DeleteRequest) -> schema.DeleteResponse:
        """Removes one context and its files, or one file of sessions."""
        self.require(endpoints=True)
        _one_of(context_id=wanted.context_id, filename=wanted.filename)
        if wanted.filename is not None:
            file = _file(wanted.filename)
            await self._call(lambda store: store.delete_file(owner, file))
            self._tell("[ATLAS] Memory file deleted: %s", file)
            return schema.DeleteResponse(success=True, filename=file)
        if wanted.context_id is None:
            raise invalid("context_id", "required field is missing")
        name = check_name(wanted.context_id, "context_id")
        await self._call(lambda store: store.delete(owner, name))
        self._tell("[ATLAS] Memory state deleted for session: %s", name)
        return schema.DeleteResponse(success=True, context_id=name)

    async def rename(self, owner: str, wanted: schema.RenameRequest) -> schema.RenameResponse:
        """Gives a session another name."""
        self.require(endpoints=True)
        source, target = check_name(wanted.session_id, "session_id"), check_name(wanted.target, "target")
        await self._call(lambda store: store.rename(owner, source, target))
        self._tell("[ATLAS] Session %s is called %s", source, target)
        return schema.RenameResponse(success=True, session_id=source, target=target)

    async def fork(self, owner: str, wanted: schema.ForkRequest) -> schema.ForkResponse:
        """Begins a session where another of the owner's is; it is stored before this returns, if sessions are."""
        self.require(endpoints=True)
        source, target = check_name(wanted.session_id, "session_id"), check_name(wanted.target, "target")

        def fork(store: SessionStore) -> None:
            if store.fork(owner, source, target):
                if self._settings.memory_persist:
                    store.save_session(owner, target)
                return
            store.info(owner, source)  # raises where it is the source that cannot be had
            raise invalid("target", "a session of this name is there already")

        await self._call(fork)
        self._tell("[ATLAS] Session %s goes on from %s", target, source)
        return schema.ForkResponse(success=True, session_id=source, target=target)

    async def reset(self, owner: str, session_id: str | None) -> schema.ResetResponse:
        """Empties one session's memory, or all of the owner's."""
        self.require(endpoints=True)
        name = None if session_id is None else check_name(session_id, "session_id")
        count = await self._call(lambda store: store.reset(owner, name))
        self._tell("[ATLAS] Memory state reset for session: %s", "*" if name is None else name)
        return schema.ResetResponse(success=True, session_id=name, sessions_reset=count, timestamp=int(time.time()))

    def _tell(self, message: str, *values: object) -> None:
        """Logs what a client had done: a client may ask for it with every turn, so operators say whether they read it."""
        log.log(logging.INFO if self._config.values.log_atlas_operations else logging.DEBUG, message, *values)

    async def _call(self, work: Callable[[SessionStore], T], *, failure: str = "The memory folder cannot be used") -> T:
        """Runs a blocking store operation in a thread, again after a pause where the failure may pass.

        Args:
          failure: what is said where the disk does not do what it is told.
        """
        engine = self._supervisor.engine
        if engine.model.memory_unavailable is not None:
            raise no_memory(engine.model.memory_unavailable, engine.fitting())
        store = engine.sessions
        try:
            for pause in _RETRY_SECONDS:
                try:
                    return await self._pools.run("sessions", lambda: work(store))
                except (MemoryUnavailable, SessionConflict):  # the latter: another server has changed it meanwhile
                    log.warning("The session store is not available; trying again in %.2f s", pause)
                    await asyncio.sleep(pause)
            return await self._pools.run("sessions", lambda: work(store))
        except OSError as error:
            log.error("[ATLAS] %s: %s", failure, error.strerror or type(error).__name__)
            raise Unavailable(failure, code="storage_failed", retry_after=30.0) from error


def _one_of(**given: str | None) -> None:
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise invalid(names[1], f"cannot be combined with {names[0]}")


def _file(name: str) -> str:
    """A file name inside the memory folder; raises BadRequest for anything that could be a path."""
    if not _FILE.fullmatch(name) or ".." in name or name.endswith(".") or _RESERVED.fullmatch(name):
        raise invalid("filename", "must be a plain file name of letters, digits, '.', '_' and '-'")
    return name
