"""How a request ends: its session is kept or put back, its row is freed, its listener hears the last event."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import EngineError, Finished, FinishReason, MemoryStats
from atlas_jax.engine.runner.base import ModelRunner
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.scheduler.decode_batch import DecodeBatch
from atlas_jax.engine.scheduler.memory_account import MemoryAccount
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.request_state import Ended, RequestState, SessionUpdate
from atlas_jax.engine.sessions.entry import NewText
from atlas_jax.engine.sessions.session import Checkpoint, Session
from atlas_jax.engine.sessions.tiers import SessionTiers

log = logging.getLogger("atlas.engine")


class Endings:
    """Ends requests, wherever they are; what goes wrong with one ends that one as failed. Runs on the engine's thread."""

    def __init__(
        self, runner: ModelRunner, batch: DecodeBatch, sessions: SessionTiers | None, counters: Counters
    ) -> None:
        self._runner = runner
        self._batch = batch
        self._sessions = sessions
        self._counters = counters

    def end(self, ended: Ended) -> None:
        """Ends a request, unless it has ended already."""
        req, outcome, row = ended
        if req.done:
            return
        if isinstance(outcome, EngineError):
            self._fail(req, outcome, row)
        else:
            self._finish(req, outcome, row)

    def _finish(self, req: RequestState, reason: FinishReason, row: int | None) -> None:
        req.done = True
        self._counters.drafted_tokens += req.decode.drafted
        self._counters.accepted_tokens += req.decode.accepted
        try:
            stats, kept = self._close_memory(req, row)
            text = None if kept is None else new_text(req, kept)
        except Exception:
            log.exception("What a request has learned could not be kept")
            self._fail(req, EngineError("The engine could not finish this request"), row)
            return
        self._free_row(req, row)
        self._counters.completed += reason in ("stop", "length")
        self._counters.cancelled += reason == "cancelled"
        try:
            self._give_back(req, kept, text, req.finished(reason, stats))
        except Exception:
            log.exception("A session could not be put back")
            self._fail(req, EngineError("The engine could not finish this request"), None)

    def _fail(self, req: RequestState, error: EngineError, row: int | None) -> None:
        self._free_row(req, row)
        try:
            self._release(req)
        except Exception:
            log.exception("A session could not be put back")
        self._counters.failed += 1
        req.fail(error)

    def _free_row(self, req: RequestState, row: int | None) -> None:
        if row is not None:
            self._batch.leave(row)
        req.prefill.take_row()

    # --- sessions -------------------------------------------------------------------------------------------------
    def _give_back(self, req: RequestState, kept: Session | None, text: NewText | None, end: Finished) -> None:
        """Returns the session as this request leaves it, or as it was; the last event follows once it is durable."""
        lease, memory = req.lease, req.request.memory
        if kept is None or text is None or lease is None or memory is None or self._sessions is None:
            self._release(req)
            req.send(end)
            return

        def done(problem: str | EngineError | None) -> None:
            if isinstance(problem, EngineError):
                req.fail(problem)
            elif problem is not None and end.memory is not None:
                req.send(replace(end, memory=replace(end.memory, degraded=problem)))
            else:
                req.send(end)

        self._sessions.commit(lease, kept, text, memory.cache_strategy, done)
        req.lease = None  # not before: if it cannot be taken, it is put back as it was

    def _release(self, req: RequestState) -> None:
        """Gives a session back as it was."""
        lease, req.lease = req.lease, None
        memory = req.request.memory
        if lease is not None and self._sessions is not None and memory is not None:
            self._sessions.release(lease, None, memory.cache_strategy)

    # --- memories -------------------------------------------------------------------------------------------------
    def _close_memory(self, req: RequestState, row: int | None) -> tuple[MemoryStats | None, Session | None]:
        """What the memory did, and the session as it goes on; None where it is to stay as it was."""
        params, memory = req.request.memory, req.memory
        if params is None or memory is None:
            return None, None
        held, index = (req.prefill.row, 0) if row is None else (self._runner.sequences, row)
        loss, skipped = self._account_writes(memory, held, index)
        read = req.cursor.position if row is None else req.decode.read
        if memory.shape.plan.window is None:  # a model's own memory is written with every token
            memory.absorb_every_token(req.cursor.start, read)
        stats = self._stats(req, memory, read, loss, skipped)
        kept: Session | None = None
        goes_on = params.write and req.request.choice == 0
        if (
            goes_on and held is not None and req.update is not None and read >= req.update.keep
        ):  # else it would be shorter
            single = held if row is None else self._runner.extract(row)  # a copy: where nothing is kept, none is made
            kept = kept_session(self._runner, req, req.update, memory, single, read, loss)
        return stats, kept

    def _account_writes(self, memory: MemoryAccount, held: Sequences | None, index: int) -> tuple[float, int]:
        """The Omega loss of the last write, and how many writes were not taken."""
        if held is None or held.memory is None or not memory.updates:
            return 0.0, 0
        loss, losses = (float(np.asarray(part)[index]) for part in (held.memory.loss, held.memory.losses))
        skipped = int(np.asarray(held.memory.skipped)[index])
        self._counters.omega_loss = loss
        self._counters.omega_losses += losses
        self._counters.writes_skipped += skipped
        memory.skip(skipped)
        return loss, skipped

    def _stats(self, req: RequestState, memory: MemoryAccount, read: int, loss: float, skipped: int) -> MemoryStats:
        capabilities, plan, session = self._runner.capabilities, memory.shape.plan, req.request.memory
        window = capabilities.window if plan.window is None else plan.window * PAGE
        left = plan.left(max(req.cursor.page, 0))
        fill = min(1.0, (read - left * PAGE) / window) if window else 0.0
        kept, capacity_kept = memory.shape.held(req.cursor.page), memory.shape.kept
        state = self._runner.state_bytes(memory.shape)
        capacity = capabilities.memory_capacity
        utilization = min(1.0, memory.absorbed / capacity) if capacity else 0.0
        counters = self._counters
        counters.memory_utilization, counters.window_fill = utilization, fill
        counters.kept_pairs, counters.kept_pairs_capacity, counters.state = kept, capacity_kept, state
        return MemoryStats(
            memory_utilization=utilization,
            window_fill_ratio=fill,
            kept_pairs=kept,
            kept_pairs_capacity=capacity_kept,
            state=state,
            omega_loss=loss,
            muon_iterations=memory.muon_iterations,
            blend_ratio_actual=memory.mean_gate,
            tokens_absorbed=memory.written,
            session_id=None if session is None or session.session is None else session.session.session_id,
            cache_hit=req.update is not None and req.update.hit,
            history="new" if req.update is None else req.update.effect,
            tokens_reused=req.prefill.cached,
            writes_skipped=skipped,
            degraded=f"{skipped} memory writes diverged and were not taken" if skipped else None,
        )


def kept_session(
    runner: ModelRunner,
    req: RequestState,
    update: SessionUpdate,
    memory: MemoryAccount,
    row: Sequences,
    read: int,
    loss: float,
) -> Session:
    """The session as this request leaves it, after `read` tokens; uses the row up."""
    session, decode, plan = update.session, req.decode, memory.shape.plan
    session.history.forget_turns(session.history.length + 1)  # a prompt that was not read to its end
    if read > decode.prompt_end >= 0:
        session.history.extend([*req.prefill.rest, *decode.generated[: read - decode.prompt_end - 1]])
        if decode.generated:
            session.history.answered(decode.prompt_end + 1, read + 1)
    if decode.generated:
        session.pending = decode.generated[-1]
    page = req.cursor.page
    row = runner.save_row(row, req.ring_pages, read, plan.slot(max(page, 0)))
    session.advance(Checkpoint(read, page, row, memory.absorbed))
    stats = session.stats
    stats.updates += memory.updates
    stats.muon_iterations += memory.muon_iterations
    if memory.updates:
        stats.omega_loss, stats.last_update = loss, time.time()
    return session


def new_text(req: RequestState, session: Session) -> NewText:
    """What this request has done to its session's text, for the journal."""
    update, memory = req.update, req.memory
    assert update is not None
    assert memory is not None
    keep, prompt = update.keep, req.request.prompt
    tokens = [*update.new, *req.decode.generated][: session.history.length - keep]

    def whole() -> Sequence[int]:
        return [*prompt[:keep], *tokens]

    return NewText(keep, tokens, whole if update.repeats else None, memory.write.reading(session.shape))
