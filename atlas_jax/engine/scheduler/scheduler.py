"""The engine's thread: admits requests, prefills prompts a step at a time, has the batch decode, and ends what has ended.

One iteration launches a prefill step, or what running answers leave time for (`prefill.PrefillPace`), and one decode step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from atlas_jax.engine.api import Embedded, EngineError, FinishReason, Prompt, SlotInfo
from atlas_jax.engine.host_memory import give_back
from atlas_jax.engine.runner.base import ModelRunner
from atlas_jax.engine.scheduler.admission import Admission
from atlas_jax.engine.scheduler.decode_batch import DecodeBatch
from atlas_jax.engine.scheduler.endings import Endings
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.prefill import MAX_IN_FLIGHT, PrefillPace, PrefillQueue
from atlas_jax.engine.scheduler.prefix_cache import PrefixCache
from atlas_jax.engine.scheduler.request_state import Ended, RequestState
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
        """Makes an idle scheduler.

        Args:
          context: tokens of the longest plain request.
          answer: tokens of an answer that names no limit.
          prefix_bytes: what cached prefixes may take, where rows can be rewound to them.
        """
        self.counters = Counters()
        self._runner = runner
        self._prefixes = PrefixCache(prefix_bytes if runner.capabilities.rewind else 0)
        self._max_rows = max_rows
        self._signal = threading.Condition()
        self._inbox: deque[RequestState] = deque()
        self._stopping = False
        self._poked = False
        self._admission = Admission(runner, tokenizer, sessions, self._prefixes, context=context, answer=answer)
        self._prefilling = PrefillQueue(runner, tokenizer, self.counters)
        self._pace = PrefillPace()
        self._batch = DecodeBatch(runner, tokenizer, self.counters)
        self._endings = Endings(runner, self._batch, sessions, self.counters)
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
        """Requests in prefill or in the decode batch."""
        return len(self._prefilling) + len(self._batch)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._inbox) + len(self._admission)

    def slots(self) -> tuple[SlotInfo, ...]:
        """The decode slots."""
        rows = list(self._batch.requests)
        rows += [None] * (self._max_rows - len(rows))
        return tuple(
            SlotInfo(
                id=index,
                busy=req is not None,
                owner=None if req is None else req.request.owner,
                prompt_tokens=0 if req is None else len(req.request.prompt),
                generated_tokens=0 if req is None else len(req.decode.generated),
                session=req is not None and req.lease is not None,
            )
            for index, req in enumerate(rows)
        )

    # --- the thread -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._admit()
                prefilled = self._prefill()
                delivered = self._decode()
                self._pace.observe(self._batch.size, prefilled, time.perf_counter(), delivered=delivered)
        except BaseException as error:
            log.exception("The engine's thread has died")
            self.failure = error
        finally:
            self._end_everything()

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False when it is time to end."""
        if not len(self._prefilling) and self._batch.idle and not self._woken(_REST_AFTER):
            self._release_idle_memory()
            self._woken(None)
        with self._signal:
            self._poked = False
            arrived, self._inbox = self._inbox, deque()
            stopping = self._stopping
        for req in arrived:
            self._admission.add(req)
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

    # --- endings --------------------------------------------------------------------------------------------------
    def _end(self, *ended: Ended) -> None:
        """Ends requests."""
        for one in ended:
            self._endings.end(one)
            self._poked = True  # there is room for one that waits, though nothing else may be left to do

    def _drop_cancelled(self) -> None:
        decoding = [Ended(req, "cancelled", row) for row, req in self._batch.active() if req.cancelled.is_set()]
        if decoding:
            self._end(*self._batch.settle())  # which ends some by themselves
        for req in [req for req in self._admission if req.cancelled.is_set()]:
            self._admission.remove(req)
            self._end(Ended(req, "cancelled"))
        for req in [req for req in self._prefilling if req.cancelled.is_set()]:
            self._contained(req, self._prefilling.settle)
            if req not in self._prefilling:  # which has failed
                continue
            self._end(Ended(req, "cancelled"))  # first: whoever sees it gone may count on its session being back
            self._prefilling.remove(req)
        self._end(*decoding)

    def _contained(self, req: RequestState, act: Callable[[RequestState], None]) -> None:
        """Does something for a request that is not in the batch; what goes wrong ends that request and no other."""
        try:
            act(req)
        except Exception as error:
            if req in self._prefilling:
                self._prefilling.remove(req)
            if not isinstance(error, EngineError):
                log.exception("A request failed in prefill")
                error = EngineError("The engine could not process this prompt")
            self._end(Ended(req, error))

    def _end_everything(self) -> None:
        """Ends what is left when the thread ends, keeping the sessions where the device still answers."""
        with self._signal:
            arrived, self._inbox = list(self._inbox), deque()
        if self.failure is None:
            self._end(*self._batch.settle())
            for req in list(self._prefilling):
                self._contained(req, self._prefilling.settle)
        outcome: FinishReason | EngineError
        outcome = "cancelled" if self.failure is None else EngineError("The engine has stopped")
        everyone = [Ended(req, outcome) for req in [*arrived, *self._admission, *self._prefilling]]
        everyone += [Ended(req, outcome, row) for row, req in self._batch.active()]
        for ended in everyone:
            try:
                self._end(ended)
            except Exception:
                log.exception("A request could not be ended")
        self._prefilling.clear()

    # --- admission ------------------------------------------------------------------------------------------------
    def _admit(self) -> None:
        while len(self._admission) and self.running < self._max_rows:
            req = self._admission.next(self._prefilling)
            if req is None:
                return
            if isinstance(req, Ended):
                self._end(req)
            else:
                self._contained(req, self._start)

    def _start(self, req: RequestState) -> None:
        self._admission.start(req)
        self._prefilling.add(req)

    # --- prefill --------------------------------------------------------------------------------------------------
    def _prefill(self) -> int:
        """Launches prefill steps, as many as running answers leave time for, and tells how many.

        A prompt that has been prefilled joins the decode batch.
        """
        steps, in_flight = 1, MAX_IN_FLIGHT
        if not self._batch.idle:
            steps = self._pace.steps(self._batch.size)
            in_flight = max(MAX_IN_FLIGHT, 2 * steps)
        launched = 0
        self._join_ready()
        while (
            launched < steps and len(self._prefilling) and self._prefilling.has_room(in_flight, wait=self._batch.idle)
        ):
            self._contained(self._prefilling.next(), self._prefilling.step)
            launched += 1
            self._join_ready()
        return launched

    def _join_ready(self) -> None:
        for req in self._prefilling.ready:
            self._contained(req, self._join)

    def _join(self, req: RequestState) -> None:
        """Puts a request whose prompt has been prefilled into the decode batch, or ends it if nothing is to be generated."""
        request = req.request
        self.counters.cached_tokens += req.prefill.cached
        if request.prompt_logprobs is not None:
            req.send(Prompt(tuple(self._prefilling.logprobs(req))))
        if request.pooling is not None:
            req.send(Embedded(self._prefilling.embedding(req)))
        if req.decode.limit == 0:
            self._end(Ended(req, "length"))
        else:
            if req.reuses and req.prefill.row is not None:
                read, prefix = request.prompt[: req.cursor.position], self._runner.prefix_row(req.prefill.row)
                self._prefixes.keep(request.owner, read, prefix, req.lora)
            alone = len(self._prefilling) <= 1 and not len(self._admission)  # the one prompt is its own
            self._resize(self._batch.grown_size(req, alone=alone))
            self._batch.add(req)
        self._prefilling.remove(req)

    # --- decode ---------------------------------------------------------------------------------------------------
    def _decode(self) -> bool:
        """Has the batch launch a step, ends what has ended, and tells whether a step's result has come."""
        alone = not len(self._prefilling) and not len(self._admission)
        self._end(*self._batch.collect())
        ended, delivered = self._batch.step()
        self._end(*ended)
        self._resize(self._batch.shrunk_size(alone=alone))
        return delivered

    def _resize(self, size: tuple[int, int] | None) -> None:
        """Gives the batch another size, if one is named."""
        if size is not None:
            self._end(*self._batch.synchronise())  # rows that have ended are not moved
            self._batch.resize(*size)
