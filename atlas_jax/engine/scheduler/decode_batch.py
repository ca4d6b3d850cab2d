"""The decode batch: who sits in which row, the step in flight, and what its result means for each.

The result of a step is looked at while the next one runs: an answer's end is noticed one step late, and that step's
surplus tokens are thrown away. A step with drafts ends at the page's end; the row sits out the next one, which was
launched before anybody knew. So does a row under a grammar, whose next tokens are not known before its last one is; it
never holds up the others. Runs on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

import numpy as np

from atlas_jax.engine.api import Delta, EngineError, FinishReason
from atlas_jax.engine.runner.base import ModelRunner
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.runner.step_inputs import memory_settings, recent_text, sampling_state
from atlas_jax.engine.scheduler.detokenizer import token_info
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.request_state import RequestState
from atlas_jax.engine.scheduler.resume import begin_page
from atlas_jax.engine.scheduler.structured_output import wait_for_any
from atlas_jax.gguf import Tokenizer
from atlas_jax.kernels.ngram_drafter import NONE
from atlas_jax.model.page_schedule import bucket

log = logging.getLogger("atlas.engine")

_SHRINK_AFTER = 64
"""Steps a batch must have been too large for before it is made smaller."""

_PATIENCE = 0.005
"""Seconds an engine with nothing else to decode waits for a grammar before it looks after its requests again."""

_GRACE = 0.25
"""PrefillStep of a step's time for which the next one waits for a grammar, once a token: most need 0.2 ms. The device is busy with
the step before, so nobody loses anything."""

Riders = list[tuple[int, RequestState]]


class Finish(Protocol):
    """Ends a request of row `index`, which must then `leave`."""

    def __call__(self, req: RequestState, reason: FinishReason, index: int, /) -> None: ...


class Fail(Protocol):
    """Ends a request of row `index` with an error; it must then `leave`."""

    def __call__(self, req: RequestState, error: EngineError, index: int, /) -> None: ...


class DecodeBatch:
    """ModelRunner that are being answered.

    Attributes:
      places: who sits in each row.
    """

    def __init__(
        self, runner: ModelRunner, tokenizer: Tokenizer, counters: Counters, *, finish: Finish, fail: Fail
    ) -> None:
        self.places: list[RequestState | None] = [None] * runner.rows
        self._runner = runner
        self._tokenizer = tokenizer
        self._counters = counters
        self._finish, self._fail = finish, fail
        self._flight: tuple[StepOutput, Riders] | None = None
        self._oversized = 0
        self._pace = 0.0
        self._rate_from = time.monotonic()
        self._rate_tokens = 0

    def __len__(self) -> int:
        """How many rows are taken."""
        return sum(req is not None for req in self.places)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self._flight is None and not len(self)

    @property
    def size(self) -> tuple[int, int]:
        """ModelRunner, and pages of each."""
        return self._runner.rows, self._runner.pages

    def active(self) -> Riders:
        """The rows that are taken."""
        return [(index, req) for index, req in enumerate(self.places) if req is not None]

    def leave(self, index: int) -> None:
        """Frees a row."""
        req, self.places[index] = self.places[index], None
        if req is not None and req.constraint is not None:
            req.constraint.close()

    # --- places ---------------------------------------------------------------------------------------------------
    def add(self, req: RequestState, *, alone: bool) -> None:
        """Gives a prompt that has been read a row; `alone`: nobody else is about to come."""
        request = req.request
        assert req.row is not None
        read = request.prompt[: req.position] if req.kept is None else req.kept.history.tail
        index = self._free_place(req.ring_pages, alone)
        self._runner.insert(
            index,
            req.row,
            req.pending_tokens[0],
            recent_text([*read, req.pending_tokens[0]], req.position),
            sampling_state(request.sampling, self._runner.vocab, req.seed, request.prompt),
            memory_settings(request.memory, *req.memory_shape),
            with_memory=request.memory is not None,
        )
        req.row = None
        self.places[index] = req
        if req.constraint is not None:
            req.constraint.open()

    def _free_place(self, pages: int, alone: bool) -> int:
        """A free row. The batch grows if it must; an empty one gets the size that is needed now."""
        busy = [req for _, req in self.active()]
        pages = max([pages, *(req.ring_pages for req in busy)])
        wanted = self._size(len(busy) + 1, pages)
        if len(busy) == self.size[0] or pages > self.size[1] or (alone and not busy and wanted != self.size):
            self._resize(*wanted)
        return self.places.index(None)

    def _size(self, rows: int, pages: int) -> tuple[int, int]:
        return bucket(rows, self._runner.buckets.rows), bucket(pages, self._runner.buckets.pages)

    def _resize(self, rows: int, pages: int) -> None:
        self.synchronise()
        busy = [index for index, _ in self.active()]
        self._runner.resize(rows, pages, {index: place for place, index in enumerate(busy)})
        self.places = [self.places[index] for index in busy] + [None] * (rows - len(busy))
        self._oversized = 0

    def _shrink_if_oversized(self, alone: bool) -> None:
        busy = [req for _, req in self.active()]
        if not busy:  # the last of them ended while its surplus step was on its way
            return
        wanted = self._size(len(busy), max(req.ring_pages for req in busy))
        smaller = wanted[0] < self._runner.rows or wanted[1] < self._runner.pages
        self._oversized = self._oversized + 1 if smaller else 0
        if self._oversized > _SHRINK_AFTER and alone:
            self._resize(*wanted)

    def release_memory(self) -> None:
        """Gives an empty batch its least size: nobody needs what many clients needed any more."""
        least = self._size(1, 1)
        if least != self.size:
            self._resize(*least)

    # --- steps ----------------------------------------------------------------------------------------------------
    def step(self, *, alone: bool) -> bool:
        """Launches a step for everyone who still needs one, and delivers what the step before has drawn, if there was one."""
        launched = time.perf_counter()
        landed = False
        bound = [(index, req) for index, req in self.active() if req.constraint is not None]
        free = len(bound) < len(self)
        if not self._runner.can_rewind or (bound and not free):
            landed = (
                self.synchronise()
            )  # what a row may draw, or that it must not read on, follows from the token before
        flight, width = self._flight, self._runner.width
        if bound:
            self._collect_masks(bound)
            if not free:
                wait_for_any([req.constraint for _, req in bound if req.constraint and not req.done], _PATIENCE)
        self._flight, riders = self._launch(width)
        if flight is not None:
            self._deliver(*flight)
        landed = landed or flight is not None
        if landed:
            self._counters.steps += 1
            self._counters.step_seconds += time.perf_counter() - launched
            self._pace += 0.1 * (time.perf_counter() - launched - self._pace)
        for _, req in riders:
            req.launched += 1
            req.in_flight = width
        if riders:
            self._shrink_if_oversized(alone)
        return landed

    def _collect_masks(self, bound: Riders) -> None:
        """Looks which tokens may come next in the rows under a grammar, and ends those where nothing can."""
        until = time.monotonic() + self._pace * _GRACE
        for index, req in bound:
            constraint = req.constraint
            if req.done or req.in_flight or constraint is None or constraint.ready:
                continue
            wait = until - time.monotonic() if req.fresh else 0.0
            req.fresh = False
            try:
                if constraint.look(max(0.0, wait)) and (constraint.complete or len(req.generated) >= req.limit):
                    self._end(index, req, "stop" if constraint.complete else "length")
            except EngineError as error:
                self._fail(req, error, index)
            except Exception:
                log.exception("A grammar failed")
                self._fail(req, EngineError("The engine could not finish this request"), index)

    def _launch(self, width: int) -> tuple[tuple[StepOutput, Riders] | None, Riders]:
        riders = [
            (index, req)
            for index, req in self.active()
            if not req.done
            and len(req.generated) + req.certain < req.limit
            and (req.constraint is None or req.constraint.ready)
        ]
        if not riders:
            return None, []
        wanted = np.zeros(len(self.places), np.int32)
        for index, req in riders:
            if req.page_due:
                self._runner.start_page_in_batch(index, *begin_page(self._runner, self._counters, req))
            wanted[index] = min(width, req.limit - len(req.generated) - req.certain)
        return (self._runner.decode(wanted, self._allowed(riders, wanted)), riders), riders

    def _allowed(self, riders: Riders, wanted: np.ndarray) -> np.ndarray | None:
        """Which tokens may come next, a bit each; None where all may.

        A row under a grammar takes no drafts: what may follow them is not known in time.
        """
        allowed = None
        for index, req in riders:
            if req.constraint is not None:
                allowed = self._runner.allow_all() if allowed is None else allowed
                wanted[index] = 1
                req.constraint.allow(allowed[index])
        return allowed

    # --- results --------------------------------------------------------------------------------------------------
    def synchronise(self) -> bool:
        """Looks at the step in flight, if there is one, and tells whether there was.

        To be called before the batch is rearranged, or a row that cannot be set back is taken out of it.
        """
        flight, self._flight = self._flight, None
        if flight is not None:
            self._deliver(*flight)
        return flight is not None

    def _deliver(self, packed: StepOutput, riders: Riders) -> None:
        integers, numbers = np.asarray(packed.integers), np.asarray(packed.numbers)
        before = self._counters.generated_tokens
        for index, req in riders:
            req.in_flight = 0
            if req.done:
                continue
            try:
                self._take(index, req, integers[index], numbers[index])
            except EngineError as error:
                self._fail(req, error, index)
            except Exception:
                log.exception("A request failed while its answer was delivered")
                self._fail(req, EngineError("The engine could not finish this request"), index)
        self._count_rate(self._counters.generated_tokens - before)

    def _take(self, index: int, req: RequestState, integers: np.ndarray, numbers: np.ndarray) -> None:
        """What a step has drawn for one row."""
        tokens = integers[:, 0]
        fed, drawn = int((tokens != NONE).sum()), int((tokens >= 0).sum())
        req.drafted += max(0, fed - 1)
        req.accepted += max(0, drawn - 1)
        for place in range(drawn):
            req.position += 1
            self._take_token(index, req, integers[place], numbers[place])
            if req.done:
                return

    def _take_token(self, index: int, req: RequestState, integers: np.ndarray, numbers: np.ndarray) -> None:
        token = int(integers[0])
        if not req.generated:
            req.prefilled_at = time.monotonic()
        req.generated.append(token)
        self._counters.generated_tokens += 1
        if numbers[1] > 0:
            req.gate_sum += float(numbers[1])
            req.gate_count += 1
        request = req.request
        if token in self._tokenizer.eog_ids and not request.ignore_eos:
            _send(req, req.detokenizer.finish())
            self._finish(req, "stop", index)
            return
        wanted = request.sampling.logprobs
        info = None
        if wanted is not None:
            top = integers[1 : 1 + wanted], numbers[2 : 2 + wanted]
            info = token_info(self._tokenizer, token, float(numbers[0]), *top)
        _send(req, req.detokenizer.push(token, info))
        if req.detokenizer.matched is not None:
            self._finish(req, "stop", index)
        elif req.constraint is not None:  # whether it is complete is known when its grammar has seen the token
            req.constraint.take(token)
            req.fresh = True
        elif len(req.generated) >= req.limit:
            self._end(index, req, "length")

    def _end(self, index: int, req: RequestState, reason: FinishReason) -> None:
        """Ends an answer by itself, after the text that its stop strings have held back."""
        _send(req, req.detokenizer.finish())
        self._finish(req, "stop" if req.detokenizer.matched is not None else reason, index)

    def _count_rate(self, tokens: int) -> None:
        now = time.monotonic()
        self._rate_tokens += tokens
        if now - self._rate_from >= 1.0:
            self._counters.tokens_per_second = self._rate_tokens / (now - self._rate_from)
            self._rate_from, self._rate_tokens = now, 0


def _send(req: RequestState, delta: Delta | None) -> None:
    if delta is not None:
        req.send(delta)
