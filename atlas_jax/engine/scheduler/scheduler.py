"""The engine's thread: admits requests, reads prompts a part at a time, has the batch decode, and ends what has ended.

One turn of the loop launches a part of a prompt, or what streams leave time for (`reading.PrefillPace`), and one decode step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import (
    EngineError,
    Failed,
    Finished,
    FinishReason,
    InvalidRequest,
    MemoryStats,
    MemoryUnavailable,
    Prompt,
    SlotInfo,
)
from atlas_jax.engine.host_memory import give_back
from atlas_jax.engine.runner.base import ModelRunner
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.scheduler.decode_batch import DecodeBatch
from atlas_jax.engine.scheduler.detokenizer import token_info
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.prefill import AHEAD, PrefillPace, PrefillQueue
from atlas_jax.engine.scheduler.prefix_cache import PrefixCache
from atlas_jax.engine.scheduler.request_queue import FairQueue
from atlas_jax.engine.scheduler.request_state import RequestState
from atlas_jax.engine.scheduler.resume import kept_session, new_text, resume, resume_plain, same_shape
from atlas_jax.engine.sessions.entry import NewText
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.tiers import SessionTiers
from atlas_jax.gguf import Tokenizer

log = logging.getLogger("atlas.engine")

_REST_AFTER = 5.0
"""Seconds without a request after which an engine gives back the memory that the last ones needed. SmolLM2-135M held 6196 MiB
after three bursts of 32 requests, 1025 of them arrays: 2587 were the C library's, 666 the batch's."""


class Scheduler:
    """Owns the runner; everything but `submit`, `wake`, `cancel`, `stop` and the read-only views runs on its thread."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        sessions: SessionTiers | None,
        *,
        max_rows: int,
        context: int,
        answer: int,
        prefix_bytes: int,
    ) -> None:
        """Makes an idle loop.

        Args:
          context: tokens of the longest plain request.
          answer: tokens of an answer that names no limit.
        """
        self.counters = Counters()
        self._runner = runner
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._prefixes = PrefixCache(prefix_bytes)
        self._max_rows = max_rows
        self._context = context
        self._answer = answer
        self._signal = threading.Condition()
        self._inbox: deque[RequestState] = deque()
        self._stopping = False
        self._poked = False
        self._waiting: FairQueue[RequestState] = FairQueue()
        self._prompts = PrefillQueue(runner, tokenizer, self.counters)
        self._pace = PrefillPace()
        self._batch = DecodeBatch(runner, tokenizer, self.counters, finish=self._finish, fail=self._fail)
        self.failure: BaseException | None = None
        self._held = 0
        self._release_failed = False
        self._thread = threading.Thread(target=self._run, name="atlas-engine", daemon=True)

    # --- from other threads ---------------------------------------------------------------------------------------
    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, req: RequestState) -> None:
        """Hands a request over."""
        with self._signal:
            self._inbox.append(req)
            self.counters.requests += 1
            self._signal.notify()

    def wake(self) -> None:
        """Makes an idle thread look at what is waiting again."""
        with self._signal:
            self._poked = True
            self._signal.notify()

    def stop(self, timeout: float) -> bool:
        """Ends running requests as cancelled and the thread; tells whether it ended in time."""
        with self._signal:
            self._stopping = True
            self._signal.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests being read or answered."""
        return len(self._prompts) + len(self._batch)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._inbox) + len(self._waiting)

    def slots(self) -> tuple[SlotInfo, ...]:
        """The decode slots."""
        places = list(self._batch.places)
        places += [None] * (self._max_rows - len(places))
        return tuple(
            SlotInfo(
                id=index,
                busy=req is not None,
                owner=None if req is None else req.request.owner,
                prompt_tokens=0 if req is None else len(req.request.prompt),
                generated_tokens=0 if req is None else len(req.generated),
                session=req is not None and req.lease is not None,
            )
            for index, req in enumerate(places)
        )

    # --- the thread -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._admit()
                parts = self._prefill()
                landed = self._batch.step(alone=not len(self._prompts) and not len(self._waiting))
                self._pace.turned(self._batch.size, parts, time.perf_counter(), landed=landed)
        except BaseException as error:
            log.exception("The engine's thread has died")
            self.failure = error
        finally:
            self._end_everything()

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False when it is time to end."""
        if not len(self._prompts) and self._batch.idle and not self._woken(_REST_AFTER):
            self._release_idle_memory()
            self._woken(None)
        with self._signal:
            self._poked = False
            arrived, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for req in arrived:
            self._waiting.push(req.request.owner, req)
        return not stopping

    def _release_idle_memory(self) -> None:
        """Gives back what an idle engine does not need; if that fails, requests are served without."""
        try:
            self._batch.release_memory()
            self._held = give_back(self._held)
        except Exception:
            if not self._release_failed:  # said once: it would fail again after every pause
                log.exception("An idle engine could not give its memory back; it goes on serving")
            self._release_failed = True

    def _woken(self, timeout: float | None) -> bool:
        """Waits until somebody wants something; False if nobody did in time."""
        with self._signal:
            return self._signal.wait_for(lambda: bool(self._inbox or self._poked or self._stopping), timeout)

    def _drop_cancelled(self) -> None:
        if not self._runner.can_rewind and any(req.cancelled.is_set() for _, req in self._batch.active()):
            self._batch.synchronise()
        for req in [req for req in self._waiting if req.cancelled.is_set()]:
            self._waiting.remove(req)
            self._finish(req, "cancelled")
        for req in [req for req in self._prompts if req.cancelled.is_set()]:
            self._finish(req, "cancelled")  # first: whoever sees it gone may count on its session being back
            self._prompts.remove(req)
        for index, req in self._batch.active():
            if req.cancelled.is_set():
                self._finish(req, "cancelled", index)

    # --- admission ------------------------------------------------------------------------------------------------
    def _admit(self) -> None:
        while len(self._waiting) and self.running < self._max_rows:
            req = self._waiting.take(self._ready)
            if req is None:
                return
            if req.done:
                continue
            self._contained(req, self._begin)

    def _contained(self, req: RequestState, act: Callable[[RequestState], None]) -> None:
        """Does something for a request that is not in the batch; what goes wrong ends that request and no other."""
        try:
            act(req)
        except Exception as error:
            if req in self._prompts:
                self._prompts.remove(req)
            if not isinstance(error, EngineError):
                log.exception("A request failed while its prompt was read")
                error = EngineError("The engine could not read this prompt")
            self._fail(req, error)

    def _ready(self, req: RequestState) -> bool:
        """Whether a request can begin; takes its session if it can. One that cannot be had fails here."""
        if self._prefixes.budget and any(reading.reads_for(req) for reading in self._prompts):
            return False
        memory = req.request.memory
        if memory is None or memory.session is None or self._sessions is None:
            return True
        try:
            req.lease = self._sessions.acquire(memory.session)
        except Exception as error:
            if not isinstance(error, EngineError):
                log.exception("A session could not be taken")
                error = MemoryUnavailable("The session's memory cannot be read", retry_after=5.0)
            self._fail(req, error)
            return True
        return req.lease is not None

    def _begin(self, req: RequestState) -> None:
        """Finds where the prompt goes on from, and gives it a row."""
        req.started = time.monotonic()
        request = req.request
        prompt = request.prompt
        req.limit = self._answer if request.max_tokens is None else request.max_tokens
        memory = request.memory
        if memory is None:
            req.limit = min(req.limit, self._context - len(prompt))
            req.ring_pages = self._runner.ring_pages(req.plan, len(prompt) + req.limit)
            resume_plain(self._runner, self._prefixes, req)
        else:
            req.shape = self._runner.shape(memory)
            session = req.lease.session if req.lease is not None else None
            if session is not None and session.tokens:
                req.shape = same_shape(session.shape, req.shape, memory.given)
            req.ring_pages = self._runner.ring_pages(req.plan, len(prompt) + req.limit)
            if req.lease is not None:
                session = session or Session(req.lease.key, req.shape)
                resume(self._runner, req, session, self._tokenizer.bos_id if self._tokenizer.add_bos else None)
            else:
                req.pending_tokens = list(request.prompt)
                req.row = self._runner.new_row(1)
            req.write = MemoryWrite.from_params(memory, req.shape.degree)
            self._fit_context(req)
        req.began = req.position
        self._prompts.add(req)

    def _fit_context(self, req: RequestState) -> None:
        """Ends a session's answer where the model has no room left for it.

        Raises:
          InvalidRequest: there is none for the prompt.
        """
        context = self._runner.session_context
        if context is None:
            return
        room = context - req.position - len(req.pending_tokens)
        if room < 0 or (room == 0 and req.limit):
            raise InvalidRequest(
                f"The session would have {req.position + len(req.pending_tokens)} tokens, but this model attends to all of them and "
                f"its context is {context}",
                param="prompt",
                code="context_length_exceeded",
            )
        req.limit = min(req.limit, room)

    # --- reading prompts ------------------------------------------------------------------------------------------
    def _prefill(self) -> int:
        """Launches parts of prompts, as many as streams leave time for, and tells how many.

        A prompt that has been read joins the decode batch.
        """
        parts, ahead = 1, AHEAD
        if not self._batch.idle:
            parts = self._pace.parts(self._batch.size)
            ahead = max(AHEAD, 2 * parts)
        launched = 0
        for req in self._prompts.ready:
            self._contained(req, self._join)
        while launched < parts and len(self._prompts) and self._prompts.has_room(ahead, wait=self._batch.idle):
            self._contained(self._prompts.next(), self._prompts.read)
            launched += 1
            for read in self._prompts.ready:
                self._contained(read, self._join)
        return launched

    def _join(self, req: RequestState) -> None:
        """Puts a prompt that has been read into the decode batch, or ends it if nothing is to be generated."""
        request = req.request
        req.prompt_end = req.position if req.limit else -1
        req.pending_tokens, req.prefilled = req.pending_tokens[req.prefilled :], 0
        self.counters.cached_tokens += req.cached
        if req.request.prompt_logprobs is not None:
            if not req.scored:
                req.scored.append(token_info(self._tokenizer, req.request.prompt[0], None, (), ()))
            req.send(Prompt(tuple(req.scored)))
        if req.limit == 0:
            self._finish(req, "length")
        else:
            assert req.row is not None
            if req.reuses:
                self._prefixes.keep(request.owner, request.prompt[: req.position], req.row.cache)
            self._batch.add(req, alone=len(self._prompts) <= 1 and not len(self._waiting))  # the one prompt is its own
        self._prompts.remove(req)

    # --- endings --------------------------------------------------------------------------------------------------
    def _finish(self, req: RequestState, reason: FinishReason, index: int | None = None) -> None:
        """Ends a request: keeps its session, frees its row, tells the listener."""
        if req.done:
            return
        req.done = True
        self.counters.drafted_tokens += req.drafted
        self.counters.accepted_tokens += req.accepted
        try:
            stats, kept = self._close_memory(req, reason, index)
            text = None if kept is None else new_text(req, kept)
        except Exception:
            log.exception("What a request has learned could not be kept")
            req.done = False
            self._fail(req, EngineError("The engine could not finish this request"), index)
            return
        if index is not None:
            self._batch.leave(index)
        req.row = None
        self._poked = True  # there is room for one that waits, though nothing else may be left to do
        self.counters.completed += reason in ("stop", "length")
        self.counters.cancelled += reason == "cancelled"
        try:
            self._give_back(req, kept, text, req.finished(reason, stats))
        except Exception:
            log.exception("A session could not be put back")
            req.done = False
            self._fail(req, EngineError("The engine could not finish this request"))

    def _give_back(self, req: RequestState, kept: Session | None, text: NewText | None, end: Finished) -> None:
        """Returns the session as this request leaves it, or as it was; the last event follows once it is durable."""
        lease, memory = req.lease, req.request.memory
        if kept is None or text is None or lease is None or memory is None or self._sessions is None:
            self._release(req)
            req.send(end)
            return

        def done(problem: str | None) -> None:
            if problem is not None and end.memory is not None:
                req.send(replace(end, memory=replace(end.memory, degraded=problem)))
            else:
                req.send(end)

        self._sessions.commit(lease, kept, text, memory.cache_strategy, done)
        req.lease = None  # not before: if it cannot be taken, it is put back as it was

    def _fail(self, req: RequestState, error: EngineError, index: int | None = None) -> None:
        if req.done:
            return
        if index is not None:
            self._batch.leave(index)
        req.row = None
        try:
            self._release(req)
        except Exception:
            log.exception("A session could not be put back")
        self._poked = True
        self.counters.failed += 1
        req.fail(Failed(error))

    def _close_memory(
        self, req: RequestState, reason: FinishReason, index: int | None
    ) -> tuple[MemoryStats | None, Session | None]:
        """What the memory did, and the session as it goes on; None where it is to stay as it was."""
        memory = req.request.memory
        if memory is None or req.shape is None:
            return None, None
        held, place = (req.row, 0) if index is None else (self._runner.sequences, index)
        loss, skipped = 0.0, 0
        if held is not None and held.memory is not None and req.updates:
            loss, losses = (float(np.asarray(part)[place]) for part in (held.memory.loss, held.memory.losses))
            skipped = int(np.asarray(held.memory.skipped)[place])
            self.counters.omega_loss = loss
            self.counters.omega_losses += losses
            self.counters.writes_skipped += skipped
            req.skip(skipped)
        read = req.position if index is None else req.read_tokens
        if req.plan.window is None:  # a model's own memory is written with every token
            req.account(read)
        window = self._runner.window if req.plan.window is None else req.plan.window * PAGE
        fill = min(1.0, (read - req.plan.left(max(req.page, 0)) * PAGE) / window) if window else 0.0
        capacity = self._runner.capacity
        utilization = min(1.0, req.absorbed / capacity) if capacity else 0.0
        self.counters.memory_utilization, self.counters.window_fill = utilization, fill
        kept: Session | None = None
        goes_on = memory.write and req.request.choice == 0 and read >= req.keep  # else it would be shorter than it was
        if goes_on and req.kept is not None and held is not None:
            row = held if index is None else self._runner.extract(index)  # a copy: where nothing is kept, none is made
            kept = kept_session(self._runner, req, row, read, loss)
        passes = req.gate_sum / req.gate_count if req.gate_count else 0.0
        stats = MemoryStats(
            memory_utilization=utilization,
            window_fill_ratio=fill,
            omega_loss=loss,
            muon_iterations=req.muon_iterations,
            blend_ratio_actual=passes,
            tokens_absorbed=req.written,
            session_id=None if memory.session is None else memory.session.session_id,
            cache_hit=req.cache_hit,
            history=req.history,
            tokens_reused=req.cached,
            writes_skipped=skipped,
            degraded=f"{skipped} memory writes diverged and were not taken" if skipped else None,
        )
        return stats, kept

    def _release(self, req: RequestState) -> None:
        """Gives a session back as it was."""
        lease, req.lease = req.lease, None
        memory = req.request.memory
        if lease is not None and self._sessions is not None and memory is not None:
            self._sessions.release(lease, None, memory.cache_strategy)

    def _end_everything(self) -> None:
        """Ends what is left when the thread ends, keeping the sessions where the device still answers."""
        with self._signal:
            arrived, self._inbox = list(self._inbox), deque()
        if self.failure is None and not self._runner.can_rewind:
            self._batch.synchronise()
        everyone: list[tuple[RequestState, int | None]] = [
            (req, None) for req in [*arrived, *self._waiting, *self._prompts]
        ]
        everyone += [(req, index) for index, req in self._batch.active()]
        for req, index in everyone:
            try:
                if self.failure is not None:
                    self._fail(req, EngineError("The engine has stopped"), index)
                else:
                    self._finish(req, "cancelled", index)
            except Exception:
                log.exception("A request could not be ended")
        self._prompts.clear()
