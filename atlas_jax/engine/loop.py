"""The engine's thread: admits requests, reads prompts a chunk at a time, decodes the batch, and delivers what comes out.

One turn of the loop reads at most one chunk of one prompt and launches one decode step, so no stream waits longer than
one chunk. The result of a step is looked at while the next one runs: an answer's end is noticed one step late, and that
step's surplus tokens are thrown away. A step with drafts ends at the page's end; the row sits out the next one, which was
launched before anybody knew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import (
    Delta,
    EngineError,
    Failed,
    FinishReason,
    MemoryStats,
    Prompt,
    SlotInfo,
    TokenInfo,
)
from atlas_jax.engine.counters import Counters
from atlas_jax.engine.prefix import PrefixCache
from atlas_jax.engine.queue import FairQueue
from atlas_jax.engine.runner import Runner
from atlas_jax.engine.session import Session, SessionShape
from atlas_jax.engine.sessions import SessionTable
from atlas_jax.engine.settings import MemoryWrite, memory_settings, recent_text, sampling_state
from atlas_jax.engine.step import Packed
from atlas_jax.engine.turns import kept_session, resume, resume_plain, same_shape
from atlas_jax.engine.work import Work
from atlas_jax.gguf import Tokenizer
from atlas_jax.kernels.lookup import NONE
from atlas_jax.memory.recall import MUON
from atlas_jax.model.window import Turn, WindowPlan, bucket

log = logging.getLogger("atlas.engine")

_SHRINK_AFTER = 256
"""Steps a batch must have been too large for before it is made smaller."""


class Loop:
    """Owns the runner; everything but `submit`, `wake`, `cancel`, `stop` and the read-only views runs on its thread."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        sessions: SessionTable | None,
        *,
        max_rows: int,
        context: int,
        prefix_bytes: int,
    ) -> None:
        self.counters = Counters()
        self._runner = runner
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._prefixes = PrefixCache(prefix_bytes)
        self._max_rows = max_rows
        self._context = context
        self._signal = threading.Condition()
        self._inbox: deque[Work] = deque()
        self._stopping = False
        self._poked = False
        self._waiting: FairQueue[Work] = FairQueue()
        self._lanes: deque[Work] = deque()
        self._places: list[Work | None] = [None] * runner.rows
        self._flight: tuple[Packed, list[tuple[int, Work]]] | None = None
        self._oversized = 0
        self._rate_from = time.monotonic()
        self._rate_tokens = 0
        self.failure: BaseException | None = None
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
        return len(self._lanes) + sum(work is not None for work in self._places)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._inbox) + len(self._waiting)

    def slots(self) -> tuple[SlotInfo, ...]:
        """The decode slots."""
        places = list(self._places)
        places += [None] * (self._max_rows - len(places))
        return tuple(
            SlotInfo(
                id=index,
                busy=work is not None,
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
                self._read_some()
                self._decode()
        except BaseException as error:
            log.exception("The engine's thread has died")
            self.failure = error
        finally:
            self._end_everything()

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False when it is time to end."""
        with self._signal:
            idle = not self._lanes and self._flight is None and not any(self._places)
            while idle and not self._inbox and not self._poked and not self._stopping:
                self._signal.wait()
            self._poked = False
            arrived, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for work in arrived:
            self._waiting.push(work.request.owner, work)
        return not stopping

    def _drop_cancelled(self) -> None:
        for work in [work for work in self._waiting if work.cancelled.is_set()]:
            self._waiting.remove(work)
            self._finish(work, "cancelled")
        for work in [work for work in self._lanes if work.cancelled.is_set()]:
            self._finish(work, "cancelled")  # first: whoever sees it gone may count on its session being back
            self._lanes.remove(work)
        for index, place in enumerate(self._places):
            if place is not None and place.cancelled.is_set():
                self._finish(place, "cancelled", index)

    # --- admission ------------------------------------------------------------------------------------------------
    def _admit(self) -> None:
        while len(self._waiting) and self.running < self._max_rows:
            work = self._waiting.take(self._ready)
            if work is None:
                return
            if work.done:
                continue
            try:
                self._begin(work)
            except EngineError as error:
                self._fail(work, error)

    def _ready(self, work: Work) -> bool:
        """Whether a request can begin; takes its session if it can. One that cannot be had fails here."""
        memory = work.request.memory
        if memory is None or memory.session is None or self._sessions is None:
            return True
        try:
            work.lease = self._sessions.acquire(memory.session)
        except EngineError as error:
            self._fail(work, error)
            return True
        return work.lease is not None

    def _begin(self, work: Work) -> None:
        """Finds where the prompt goes on from, and gives it a row."""
        work.started = time.monotonic()
        request = work.request
        prompt = list(request.prompt)
        work.limit = self._context if request.max_tokens is None else request.max_tokens
        memory = request.memory
        if memory is None:
            work.limit = min(work.limit, self._context - len(prompt))
            work.ring_pages = work.plan.ring(len(prompt) + work.limit)
            resume_plain(self._runner, self._prefixes, work)
        else:
            plan = WindowPlan(memory.window_size // PAGE, memory.update_frequency // PAGE)
            work.shape = SessionShape(plan, memory.memory_layers, memory.polynomial_degree)
            session = work.lease.session if work.lease is not None else None
            if session is not None and session.history.length:
                work.shape = same_shape(session.shape, work.shape, memory.given)
            assert work.shape.plan.window is not None
            work.ring_pages = work.shape.plan.window + work.shape.plan.update - 1
            if work.lease is not None:
                session = session or Session(work.lease.key, work.shape)
                resume(self._runner, work, session, prompt)
            else:
                work.feed = prompt
                work.row = self._runner.new_row(1)
            work.write = MemoryWrite.from_params(memory, work.shape.degree)
        self._lanes.append(work)

    # --- reading prompts ------------------------------------------------------------------------------------------
    def _read_some(self) -> None:
        """Reads one chunk of the prompt whose turn it is; a prompt that is read joins the decode batch."""
        if not self._lanes:
            return
        work = self._lanes[0]
        try:
            read = self._read_chunk(work)
        except Exception as error:  # only this prompt's own row is lost
            self._lanes.popleft()
            if not isinstance(error, EngineError):
                log.exception("A prompt could not be read")
                error = EngineError("The engine could not read this prompt")
            self._fail(work, error)
            return
        if read:
            self._join(work)
        self._lanes.popleft()
        if not read:
            self._lanes.append(work)

    def _read_chunk(self, work: Work) -> bool:
        """Reads up to the end of the page; tells whether only the token that starts the answer is left."""
        whole = work.limit == 0  # nothing will be generated: the last token is read like the others
        left = len(work.feed) if whole else len(work.feed) - 1
        if left <= 0:
            return True
        assert work.row is not None
        if work.needs_page:
            work.row = self._runner.at_least(work.row, work.plan.ring(work.position + 1))
            work.row = self._runner.turn(work.row, *self._page_turn(work))
        count = min(left, PAGE - work.position % PAGE)
        tokens, work.feed = work.feed[:count], work.feed[count:]
        settings = memory_settings(work.request.memory, *self._memory_shape(work))
        if work.request.prompt_logprobs is None:
            work.row = self._runner.read(work.row, settings, tokens)
        else:
            following = [*tokens[1:], work.feed[0] if work.feed else tokens[-1]]
            alternatives = work.request.prompt_logprobs > 0
            work.row, packed = self._runner.score(work.row, settings, tokens, following, alternatives=alternatives)
            self._keep_scores(work, packed, following if work.feed else following[:-1])
        if work.kept is not None:
            work.kept.history.extend(tokens)
            work.kept.pending = None
        work.position += count
        self.counters.prompt_tokens += count
        return count == left

    def _keep_scores(self, work: Work, packed: Packed, following: list[int]) -> None:
        integers, numbers = np.asarray(packed.integers), np.asarray(packed.numbers)
        if not work.scored:
            work.scored.append(self._token_info(work.request.prompt[0], None, (), ()))
        wanted = work.request.prompt_logprobs or 0
        for index, token in enumerate(following):
            top = integers[index, 1 : 1 + wanted], numbers[index, 2 : 2 + wanted]
            work.scored.append(self._token_info(token, float(numbers[index, 0]), *top))

    def _token_info(self, token: int, logprob: float | None, tokens: object, logprobs: object) -> TokenInfo:
        pairs = zip(np.asarray(tokens, np.int64).tolist(), np.asarray(logprobs, np.float64).tolist(), strict=True)
        top = tuple((other, self._tokenizer.token_bytes(other), value) for other, value in pairs)
        return TokenInfo(token, self._tokenizer.token_bytes(token), logprob, top)

    def _memory_shape(self, work: Work) -> tuple[int, int]:
        return (1, 2) if work.shape is None else (work.shape.layers, work.shape.degree)

    def _page_turn(self, work: Work) -> tuple[Turn, MemoryWrite | None]:
        memory = self._runner.config.memory
        passes = memory.passes if memory is not None and work.write is not None and work.write.optimizer == MUON else 0
        if work.begin_page(passes):
            self.counters.memory_updates += 1
            self.counters.muon_iterations += passes
        return work.plan.turn(work.page), work.write

    def _join(self, work: Work) -> None:
        """Puts a prompt that has been read into the decode batch, or ends it if nothing is to be generated."""
        request = work.request
        work.prompt_end = work.position if work.limit else -1
        self.counters.cached_tokens += work.cached
        if work.request.prompt_logprobs is not None:
            if not work.scored:
                work.scored.append(self._token_info(work.request.prompt[0], None, (), ()))
            work.send(Prompt(tuple(work.scored)))
        if work.limit == 0:
            self._finish(work, "length")
            return
        assert work.row is not None
        if work.reuses:
            self._prefixes.keep(request.owner, request.prompt[: work.position], work.row.context)
        index = self._free_place(work.ring_pages)
        layers, degree = self._memory_shape(work)
        self._runner.insert(
            index,
            work.row,
            work.feed[0],
            recent_text(self._read_text(work), work.position),
            sampling_state(work.request.sampling, self._runner.config.model.vocab, work.seed, work.request.prompt),
            memory_settings(work.request.memory, layers, degree),
            with_memory=work.request.memory is not None,
        )
        work.row = None
        self._places[index] = work

    def _read_text(self, work: Work) -> list[int]:
        """The latest tokens of its text, with the one that is fed next."""
        read = work.request.prompt[: work.position] if work.kept is None else work.kept.history.tail
        return [*read, work.feed[0]]

    def _free_place(self, pages: int) -> int:
        """A free row of the batch, which grows if it must."""
        busy = {index: work for index, work in enumerate(self._places) if work is not None}
        if len(busy) == len(self._places) or pages > self._runner.pages:
            self._resize(len(busy) + 1, max([pages, *(work.ring_pages for work in busy.values())]))
        return self._places.index(None)

    def _resize(self, rows: int, pages: int) -> None:
        self._land()
        rows, pages = bucket(rows, self._runner.buckets.rows), bucket(pages, self._runner.buckets.pages)
        busy = [index for index, work in enumerate(self._places) if work is not None]
        moves = {index: place for place, index in enumerate(busy)}
        self._runner.resize(rows, pages, moves)
        self._places = [self._places[index] for index in busy] + [None] * (rows - len(busy))
        self._oversized = 0

    # --- decoding -------------------------------------------------------------------------------------------------
    def _decode(self) -> None:
        launched = time.perf_counter()
        if any(work is not None and work.constraint is not None for work in self._places):
            self._land()  # which tokens may come next follows from the one before
        riders = [
            (index, work)
            for index, work in enumerate(self._places)
            if work is not None and not work.done and len(work.generated) + work.certain < work.limit
        ]
        flight, self._flight = self._flight, None
        if riders:
            width = self._runner.width
            wanted = np.zeros(len(self._places), np.int32)
            for index, work in riders:
                if work.page_due:
                    self._runner.turn_row(index, *self._page_turn(work))
                wanted[index] = min(width, work.limit - len(work.generated) - work.certain)
            riders, allowed = self._constrain(riders, wanted)
            self._flight = (self._runner.decode(wanted, allowed), riders)
        if flight is not None:
            self._deliver(*flight)
            self.counters.steps += 1
            self.counters.step_seconds += time.perf_counter() - launched
        if riders:
            for _, work in riders:
                work.launched += 1
                work.flying = width
            self._shrink_if_oversized(len(riders))

    def _constrain(
        self, riders: list[tuple[int, Work]], wanted: np.ndarray
    ) -> tuple[list[tuple[int, Work]], np.ndarray | None]:
        """Which tokens may come next, a bit each, and who still rides; None where all may.

        A row under a grammar takes no drafts: what may follow them is not known in time.
        """
        if all(work.constraint is None for _, work in riders):
            return riders, None
        allowed = self._runner.all_allowed()
        left = []
        for index, work in riders:
            try:
                if work.constraint is not None:
                    wanted[index] = 1
                    work.constraint.allow(allowed[index])
                left.append((index, work))
            except EngineError as error:
                wanted[index] = 0
                self._fail(work, error, index)
        return left, allowed

    def _land(self) -> None:
        """Looks at the step in flight before the batch is rearranged."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._deliver(*flight)

    def _shrink_if_oversized(self, busy: int) -> None:
        if not any(self._places):  # the last of them ended while its surplus step was on its way
            return
        wanted = bucket(busy, self._runner.buckets.rows)
        pages = bucket(max(w.ring_pages for w in self._places if w is not None), self._runner.buckets.pages)
        self._oversized = self._oversized + 1 if wanted < self._runner.rows or pages < self._runner.pages else 0
        if self._oversized > _SHRINK_AFTER and not self._lanes and not len(self._waiting):
            self._resize(busy, pages)

    def _deliver(self, packed: Packed, riders: list[tuple[int, Work]]) -> None:
        integers, numbers = np.asarray(packed.integers), np.asarray(packed.numbers)
        before = self.counters.generated_tokens
        for index, work in riders:
            work.flying = 0
            if work.done:
                continue
            try:
                tokens = integers[index, :, 0]
                fed, drawn = int((tokens != NONE).sum()), int((tokens >= 0).sum())
                work.drafted += max(0, fed - 1)
                work.accepted += max(0, drawn - 1)
                for place in range(drawn):
                    work.position += 1
                    self._take_token(index, work, integers[index, place], numbers[index, place])
                    if work.done:
                        break
            except EngineError as error:
                self._fail(work, error, index)
            except Exception:
                log.exception("A request failed while its answer was delivered")
                self._fail(work, EngineError("The engine could not finish this request"), index)
        self._count_rate(self.counters.generated_tokens - before)

    def _count_rate(self, tokens: int) -> None:
        now = time.monotonic()
        self._rate_tokens += tokens
        if now - self._rate_from >= 1.0:
            self.counters.tokens_per_second = self._rate_tokens / (now - self._rate_from)
            self._rate_from, self._rate_tokens = now, 0

    def _take_token(self, index: int, work: Work, integers: np.ndarray, numbers: np.ndarray) -> None:
        token = int(integers[0])
        if not work.generated:
            work.read_at = time.monotonic()
        work.generated.append(token)
        self.counters.generated_tokens += 1
        if numbers[1] > 0:
            work.gate_sum += float(numbers[1])
            work.gate_count += 1
        request = work.request
        if token in self._tokenizer.eog_ids and not request.ignore_eos:
            self._end_text(work)
            self._finish(work, "stop", index)
            return
        wanted = request.sampling.logprobs
        info = None
        if wanted is not None:
            top = integers[1 : 1 + wanted], numbers[2 : 2 + wanted]
            info = self._token_info(token, float(numbers[0]), *top)
        if work.constraint is not None:
            work.constraint.take(token)
        self._send_text(work, work.stream.push(token, info))
        if work.stream.matched is not None:
            self._finish(work, "stop", index)
        elif work.constraint is not None and work.constraint.complete:
            self._end_text(work)
            self._finish(work, "stop", index)
        elif len(work.generated) >= work.limit:
            self._end_text(work)
            self._finish(work, "stop" if work.stream.matched is not None else "length", index)

    def _end_text(self, work: Work) -> None:
        self._send_text(work, work.stream.finish())

    def _send_text(self, work: Work, delta: Delta | None) -> None:
        if delta is not None:
            work.send(delta)

    # --- endings --------------------------------------------------------------------------------------------------
    def _finish(self, work: Work, reason: FinishReason, index: int | None = None) -> None:
        """Ends a request: keeps its session, frees its row, tells the listener."""
        if work.done:
            return
        work.done = True
        self.counters.drafted_tokens += work.drafted
        self.counters.accepted_tokens += work.accepted
        stats = self._close_memory(work, reason, index)
        if index is not None:
            self._places[index] = None
        work.row = None
        self.counters.completed += reason in ("stop", "length")
        self.counters.cancelled += reason == "cancelled"
        work.send(work.finished(reason, stats))

    def _fail(self, work: Work, error: EngineError, index: int | None = None) -> None:
        if work.done:
            return
        if index is not None:
            self._places[index] = None
        work.row = None
        self._release(work, None)
        self.counters.failed += 1
        work.fail(Failed(error))

    def _close_memory(self, work: Work, reason: FinishReason, index: int | None) -> MemoryStats | None:
        """Keeps what a session has learned, and measures what the memory did."""
        memory = work.request.memory
        if memory is None or work.shape is None:
            self._release(work, None)
            return None
        row = work.row if index is None else self._runner.extract(index)
        loss = 0.0
        if row is not None and row.memory is not None and work.updates:
            loss = float(np.asarray(row.memory.loss)[0])
            self.counters.omega_loss += loss
        read = work.position if index is None else work.read_tokens
        window = work.plan.window or 0
        fill = min(1.0, (read - work.plan.left(max(work.page, 0)) * PAGE) / (window * PAGE)) if window else 0.0
        config = self._runner.config.memory
        utilization = min(1.0, work.absorbed / config.features) if config is not None else 0.0
        self.counters.memory_utilization, self.counters.window_fill = utilization, fill
        keeps = memory.write and work.request.choice == 0 and work.kept is not None and row is not None
        self._release(work, kept_session(self._runner, work, row, read, loss) if keeps and row is not None else None)
        passes = work.gate_sum / work.gate_count if work.gate_count else 0.0
        return MemoryStats(
            memory_utilization=utilization,
            window_fill_ratio=fill,
            omega_loss=loss,
            muon_iterations=work.muon_iterations,
            blend_ratio_actual=passes,
            tokens_absorbed=work.updates * work.plan.update * PAGE,
            session_id=None if memory.session is None else memory.session.session_id,
            cache_hit=work.cache_hit,
        )

    def _release(self, work: Work, session: Session | None) -> None:
        lease, work.lease = work.lease, None
        memory = work.request.memory
        if lease is not None and self._sessions is not None and memory is not None:
            self._sessions.release(lease, session, memory.cache_strategy)

    def _end_everything(self) -> None:
        """Ends what is left when the thread ends, keeping the sessions where the device still answers."""
        with self._signal:
            arrived, self._inbox = list(self._inbox), deque()
        everyone: list[tuple[Work, int | None]] = [(work, None) for work in [*arrived, *self._waiting, *self._lanes]]
        everyone += [(work, index) for index, work in enumerate(self._places) if work is not None]
        for work, index in everyone:
            try:
                if self.failure is not None:
                    self._fail(work, EngineError("The engine has stopped"), index)
                else:
                    self._finish(work, "cancelled", index)
            except Exception:
                log.exception("A request could not be ended")
        self._lanes.clear()
