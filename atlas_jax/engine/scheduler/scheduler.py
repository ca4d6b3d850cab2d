"""The engine's thread: admits requests, reads prompts a part at a time, has the batch decode, and ends what has ended.

One turn of the loop launches a part of a prompt, or what streams leave time for (`reading.Pace`), and one decode step.
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
from atlas_jax.engine.runner.base import Rows
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.scheduler.decode_batch import Batch
from atlas_jax.engine.scheduler.detokenizer import token_info
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.prefill import AHEAD, Pace, Prompts
from atlas_jax.engine.scheduler.prefix_cache import PrefixCache
from atlas_jax.engine.scheduler.request_queue import FairQueue
from atlas_jax.engine.scheduler.request_state import Work
from atlas_jax.engine.scheduler.resume import (
    kept_session,
    new_text,
    resume,
    resume_plain,
    same_shape,
)
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.tiers import NewText, SessionTiers
from atlas_jax.gguf import Tokenizer

log = logging.getLogger("atlas.engine")

_REST_AFTER = 5.0
"""Seconds without a request after which an engine gives back the memory that the last ones needed. SmolLM2-135M held 6196 MiB
after three bursts of 32 requests, 1025 of them arrays: 2587 were the C library's, 666 the batch's."""


class Loop:
    """Owns the runner; everything but `submit`, `wake`, `cancel`, `stop` and the read-only views runs on its thread."""

    def __init__(
        self,
        runner: Rows,
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
        self._inbox: deque[Work] = deque()
        self._stopping = False
        self._poked = False
        self._waiting: FairQueue[Work] = FairQueue()
        self._prompts = Prompts(runner, tokenizer, self.counters)
        self._pace = Pace()
        self._batch = Batch(runner, tokenizer, self.counters, finish=self._finish, fail=self._fail)
        self.failure: BaseException | None = None
        self._held = 0
        self._untidy = False
        self._thread = threading.Thread(target=self._run, name="atlas-engine", daemon=True)

    # --- from other threads ---------------------------------------------------------------------------------------
    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, work: Work) -> None:
        """Hands a request over."""
        with self._signal:
            self._inbox.append(work)
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
                busy=work is not None,
                owner=None if work is None else work.request.owner,
                prompt_tokens=0 if work is None else len(work.request.prompt),
                generated_tokens=0 if work is None else len(work.generated),
                session=work is not None and work.lease is not None,
            )
            for index, work in enumerate(places)
        )

    # --- the thread -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._admit()
                parts = self._read_some()
                landed = self._batch.step(alone=not len(self._prompts) and not len(self._waiting))
                self._pace.turned(self._batch.size, parts, time.perf_counter(), landed=landed)
        except BaseException as error:
            log.exception("The engine's thread has died")
            self.failure = error
        finally:
            self._end_everything()

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False when it is time to end."""
        if not len(self._prompts) and self._batch.idle and not self._called(_REST_AFTER):
            self._rest()
            self._called(None)
        with self._signal:
            self._poked = False
            arrived, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for work in arrived:
            self._waiting.push(work.request.owner, work)
        return not stopping

    def _rest(self) -> None:
        """Gives back what an idle engine does not need; if that fails, requests are served without."""
        try:
            self._batch.rest()
            self._held = give_back(self._held)
        except Exception:
            if not self._untidy:  # said once: it would fail again after every pause
                log.exception("An idle engine could not give its memory back; it goes on serving")
            self._untidy = True

    def _called(self, timeout: float | None) -> bool:
        """Waits until somebody wants something; False if nobody did in time."""
        with self._signal:
            return self._signal.wait_for(lambda: bool(self._inbox or self._poked or self._stopping), timeout)

    def _drop_cancelled(self) -> None:
        if not self._runner.rewinds and any(work.cancelled.is_set() for _, work in self._batch.sitting()):
            self._batch.land()
        for work in [work for work in self._waiting if work.cancelled.is_set()]:
            self._waiting.remove(work)
            self._finish(work, "cancelled")
        for work in [work for work in self._prompts if work.cancelled.is_set()]:
            self._finish(work, "cancelled")  # first: whoever sees it gone may count on its session being back
            self._prompts.remove(work)
        for index, work in self._batch.sitting():
            if work.cancelled.is_set():
                self._finish(work, "cancelled", index)

    # --- admission ------------------------------------------------------------------------------------------------
    def _admit(self) -> None:
        while len(self._waiting) and self.running < self._max_rows:
            work = self._waiting.take(self._ready)
            if work is None:
                return
            if work.done:
                continue
            self._guarded(work, self._begin)

    def _guarded(self, work: Work, act: Callable[[Work], None]) -> None:
        """Does something for a request that is not in the batch; what goes wrong ends that request and no other."""
        try:
            act(work)
        except Exception as error:
            if work in self._prompts:
                self._prompts.remove(work)
            if not isinstance(error, EngineError):
                log.exception("A request failed while its prompt was read")
                error = EngineError("The engine could not read this prompt")
            self._fail(work, error)

    def _ready(self, work: Work) -> bool:
        """Whether a request can begin; takes its session if it can. One that cannot be had fails here."""
        if self._prefixes.budget and any(reading.reads_for(work) for reading in self._prompts):
            return False
        memory = work.request.memory
        if memory is None or memory.session is None or self._sessions is None:
            return True
        try:
            work.lease = self._sessions.acquire(memory.session)
        except Exception as error:
            if not isinstance(error, EngineError):
                log.exception("A session could not be taken")
                error = MemoryUnavailable("The session's memory cannot be read", retry_after=5.0)
            self._fail(work, error)
            return True
        return work.lease is not None

    def _begin(self, work: Work) -> None:
        """Finds where the prompt goes on from, and gives it a row."""
        work.started = time.monotonic()
        request = work.request
        prompt = request.prompt
        work.limit = self._answer if request.max_tokens is None else request.max_tokens
        memory = request.memory
        if memory is None:
            work.limit = min(work.limit, self._context - len(prompt))
            work.ring_pages = self._runner.ring_pages(work.plan, len(prompt) + work.limit)
            resume_plain(self._runner, self._prefixes, work)
        else:
            work.shape = self._runner.shape(memory)
            session = work.lease.session if work.lease is not None else None
            if session is not None and session.tokens:
                work.shape = same_shape(session.shape, work.shape, memory.given)
            work.ring_pages = self._runner.ring_pages(work.plan, len(prompt) + work.limit)
            if work.lease is not None:
                session = session or Session(work.lease.key, work.shape)
                resume(self._runner, work, session, self._tokenizer.bos_id if self._tokenizer.add_bos else None)
            else:
                work.feed = list(request.prompt)
                work.row = self._runner.new_row(1)
            work.write = MemoryWrite.from_params(memory, work.shape.degree)
            self._fit_context(work)
        work.began = work.position
        self._prompts.add(work)

    def _fit_context(self, work: Work) -> None:
        """Ends a session's answer where the model has no room left for it.

        Raises:
          InvalidRequest: there is none for the prompt.
        """
        context = self._runner.session_context
        if context is None:
            return
        room = context - work.position - len(work.feed)
        if room < 0 or (room == 0 and work.limit):
            raise InvalidRequest(
                f"The session would have {work.position + len(work.feed)} tokens, but this model attends to all of them and "
                f"its context is {context}",
                param="prompt",
                code="context_length_exceeded",
            )
        work.limit = min(work.limit, room)

    # --- reading prompts ------------------------------------------------------------------------------------------
    def _read_some(self) -> int:
        """Launches parts of prompts, as many as streams leave time for, and tells how many.

        A prompt that has been read joins the decode batch.
        """
        parts, ahead = 1, AHEAD
        if not self._batch.idle:
            parts = self._pace.parts(self._batch.size)
            ahead = max(AHEAD, 2 * parts)
        launched = 0
        for work in self._prompts.ready:
            self._guarded(work, self._join)
        while launched < parts and len(self._prompts) and self._prompts.has_room(ahead, wait=self._batch.idle):
            self._guarded(self._prompts.next(), self._prompts.read)
            launched += 1
            for read in self._prompts.ready:
                self._guarded(read, self._join)
        return launched

    def _join(self, work: Work) -> None:
        """Puts a prompt that has been read into the decode batch, or ends it if nothing is to be generated."""
        request = work.request
        work.prompt_end = work.position if work.limit else -1
        work.feed, work.fed = work.feed[work.fed :], 0
        self.counters.cached_tokens += work.cached
        if work.request.prompt_logprobs is not None:
            if not work.scored:
                work.scored.append(token_info(self._tokenizer, work.request.prompt[0], None, (), ()))
            work.send(Prompt(tuple(work.scored)))
        if work.limit == 0:
            self._finish(work, "length")
        else:
            assert work.row is not None
            if work.reuses:
                self._prefixes.keep(request.owner, request.prompt[: work.position], work.row.context)
            self._batch.add(work, alone=len(self._prompts) <= 1 and not len(self._waiting))  # the one prompt is its own
        self._prompts.remove(work)

    # --- endings --------------------------------------------------------------------------------------------------
    def _finish(self, work: Work, reason: FinishReason, index: int | None = None) -> None:
        """Ends a request: keeps its session, frees its row, tells the listener."""
        if work.done:
            return
        work.done = True
        self.counters.drafted_tokens += work.drafted
        self.counters.accepted_tokens += work.accepted
        try:
            stats, kept = self._close_memory(work, reason, index)
            text = None if kept is None else new_text(work, kept)
        except Exception:
            log.exception("What a request has learned could not be kept")
            work.done = False
            self._fail(work, EngineError("The engine could not finish this request"), index)
            return
        if index is not None:
            self._batch.leave(index)
        work.row = None
        self._poked = True  # there is room for one that waits, though nothing else may be left to do
        self.counters.completed += reason in ("stop", "length")
        self.counters.cancelled += reason == "cancelled"
        try:
            self._give_back(work, kept, text, work.finished(reason, stats))
        except Exception:
            log.exception("A session could not be put back")
            work.done = False
            self._fail(work, EngineError("The engine could not finish this request"))

    def _give_back(self, work: Work, kept: Session | None, text: NewText | None, end: Finished) -> None:
        """Returns the session as this request leaves it, or as it was; the last event follows once it is durable."""
        lease, memory = work.lease, work.request.memory
        if kept is None or text is None or lease is None or memory is None or self._sessions is None:
            self._release(work)
            work.send(end)
            return

        def done(problem: str | None) -> None:
            if problem is not None and end.memory is not None:
                work.send(replace(end, memory=replace(end.memory, degraded=problem)))
            else:
                work.send(end)

        self._sessions.commit(lease, kept, text, memory.cache_strategy, done)
        work.lease = None  # not before: if it cannot be taken, it is put back as it was

    def _fail(self, work: Work, error: EngineError, index: int | None = None) -> None:
        if work.done:
            return
        if index is not None:
            self._batch.leave(index)
        work.row = None
        try:
            self._release(work)
        except Exception:
            log.exception("A session could not be put back")
        self._poked = True
        self.counters.failed += 1
        work.fail(Failed(error))

    def _close_memory(
        self, work: Work, reason: FinishReason, index: int | None
    ) -> tuple[MemoryStats | None, Session | None]:
        """What the memory did, and the session as it goes on; None where it is to stay as it was."""
        memory = work.request.memory
        if memory is None or work.shape is None:
            return None, None
        held, place = (work.row, 0) if index is None else (self._runner.sequences, index)
        loss, skipped = 0.0, 0
        if held is not None and held.memory is not None and work.updates:
            loss, losses = (float(np.asarray(part)[place]) for part in (held.memory.loss, held.memory.losses))
            skipped = int(np.asarray(held.memory.skipped)[place])
            self.counters.omega_loss = loss
            self.counters.omega_losses += losses
            self.counters.writes_skipped += skipped
            work.skip(skipped)
        read = work.position if index is None else work.read_tokens
        if work.plan.window is None:  # a model's own memory is written with every token
            work.account(read)
        window = self._runner.window if work.plan.window is None else work.plan.window * PAGE
        fill = min(1.0, (read - work.plan.left(max(work.page, 0)) * PAGE) / window) if window else 0.0
        capacity = self._runner.capacity
        utilization = min(1.0, work.absorbed / capacity) if capacity else 0.0
        self.counters.memory_utilization, self.counters.window_fill = utilization, fill
        kept: Session | None = None
        goes_on = (
            memory.write and work.request.choice == 0 and read >= work.keep
        )  # else it would be shorter than it was
        if goes_on and work.kept is not None and held is not None:
            row = held if index is None else self._runner.extract(index)  # a copy: where nothing is kept, none is made
            kept = kept_session(self._runner, work, row, read, loss)
        passes = work.gate_sum / work.gate_count if work.gate_count else 0.0
        stats = MemoryStats(
            memory_utilization=utilization,
            window_fill_ratio=fill,
            omega_loss=loss,
            muon_iterations=work.muon_iterations,
            blend_ratio_actual=passes,
            tokens_absorbed=work.written,
            session_id=None if memory.session is None else memory.session.session_id,
            cache_hit=work.cache_hit,
            history=work.history,
            tokens_reused=work.cached,
            writes_skipped=skipped,
            degraded=f"{skipped} memory writes diverged and were not taken" if skipped else None,
        )
        return stats, kept

    def _release(self, work: Work) -> None:
        """Gives a session back as it was."""
        lease, work.lease = work.lease, None
        memory = work.request.memory
        if lease is not None and self._sessions is not None and memory is not None:
            self._sessions.release(lease, None, memory.cache_strategy)

    def _end_everything(self) -> None:
        """Ends what is left when the thread ends, keeping the sessions where the device still answers."""
        with self._signal:
            arrived, self._inbox = list(self._inbox), deque()
        if self.failure is None and not self._runner.rewinds:
            self._batch.land()
        everyone: list[tuple[Work, int | None]] = [(work, None) for work in [*arrived, *self._waiting, *self._prompts]]
        everyone += [(work, index) for index, work in self._batch.sitting()]
        for work, index in everyone:
            try:
                if self.failure is not None:
                    self._fail(work, EngineError("The engine has stopped"), index)
                else:
                    self._finish(work, "cancelled", index)
            except Exception:
                log.exception("A request could not be ended")
        self._prompts.clear()
