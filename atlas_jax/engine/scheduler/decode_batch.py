"""The decode batch: which request has which row, the step in flight, and what its result means for each.

The result of a step is looked at while the next one runs: an answer's end is noticed one step late, and that step's
surplus tokens are thrown away. A step with drafts ends at the page's end; the row sits out the next one, which was
launched before anybody knew. So does a row under a grammar, whose next tokens are not known before its last one is; it
never holds up the others. What ends in a step is returned; the scheduler ends it, and frees its row with `leave`. Runs on
the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable

import numpy as np

from atlas_jax.engine.api import EngineError, FinishReason
from atlas_jax.engine.runner.base import ModelRunner, NewPage
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.runner.step_inputs import memory_settings, recent_text, sampling_state
from atlas_jax.engine.scheduler.detokenizer import token_info
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.request_state import Ended, RequestState
from atlas_jax.engine.scheduler.speculation import StepWidths
from atlas_jax.engine.scheduler.structured_output import wait_for_any
from atlas_jax.gguf import Tokenizer
from atlas_jax.kernels.sampling import TOP_LOGPROBS
from atlas_jax.kernels.speculative_drafter import NONE
from atlas_jax.model.page_schedule import bucket

log = logging.getLogger("atlas.engine")

_SHRINK_AFTER = 64
"""Steps a batch must have been too large for before it is made smaller."""

_PATIENCE = 0.005
"""Seconds an engine with nothing else to decode waits for a grammar before it looks after its requests again."""

_GRACE = 0.25
"""Part of a step's time for which the next one waits for a grammar, once a token: most need 0.2 ms. The device is busy with
the step before, so nobody loses anything."""

Scheduled = list[tuple[int, RequestState]]
"""Rows and their requests."""


class DecodeBatch:
    """Requests whose answers are being decoded.

    Attributes:
      requests: by row; None where one is free.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, counters: Counters) -> None:
        self.requests: list[RequestState | None] = [None] * runner.rows
        self._runner = runner
        self._tokenizer = tokenizer
        self._counters = counters
        self._in_flight: tuple[StepOutput, Scheduled] | None = None
        self._widths = StepWidths()
        self._width = 1
        self._ready_at: tuple[float, Hashable] | None = None
        self._started = 0.0
        self._collected = False
        self._awaited: list[RequestState] = []
        self._oversized = 0
        self._mean_seconds = 0.0
        self._rate_from = time.monotonic()
        self._rate_tokens = 0

    def __len__(self) -> int:
        """How many rows are taken."""
        return sum(req is not None for req in self.requests)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self._in_flight is None and not len(self)

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and pages of each."""
        return self._runner.rows, self._runner.pages

    def active(self) -> Scheduled:
        """The rows that are taken."""
        return [(row, req) for row, req in enumerate(self.requests) if req is not None]

    # --- rows -----------------------------------------------------------------------------------------------------
    def add(self, req: RequestState) -> None:
        """Gives a request whose prompt has been prefilled a free row; `grown_size` tells whether there is one."""
        request, position, token = req.request, req.cursor.position, req.prefill.rest[0]
        text = request.prompt[:position] if req.update is None else req.update.session.history.tail
        row, index = req.prefill.row, self.requests.index(None)
        assert row is not None
        self._runner.insert(
            index,
            row,
            token,
            recent_text([*text, token], position),
            sampling_state(request.sampling, self._runner.vocab, req.seed, request.prompt),
            memory_settings(request.memory, *req.memory_shape),
            with_memory=request.memory is not None,
        )
        req.prefill.take_row()
        req.decode.prompt_end = position
        self.requests[index] = req
        if req.constraint is not None:
            req.constraint.open()

    def leave(self, row: int) -> None:
        """Frees a row."""
        req, self.requests[row] = self.requests[row], None
        if req is not None and req.constraint is not None:
            req.constraint.close()

    # --- its size -------------------------------------------------------------------------------------------------
    def grown_size(self, req: RequestState, *, alone: bool) -> tuple[int, int] | None:
        """The size the batch needs for one more request, or None if it has that.

        Args:
          alone: nobody else is about to come, so that an empty batch gets the size that is needed now.
        """
        busy = [other for _, other in self.active()]
        pages = max([req.ring_pages, *(other.ring_pages for other in busy)])
        wanted = self._bucket(len(busy) + 1, pages)
        if len(busy) == self.size[0] or pages > self.size[1] or (alone and not busy and wanted != self.size):
            return wanted
        return None

    def shrunk_size(self, *, alone: bool) -> tuple[int, int] | None:
        """The size the batch should have after a step, where it has been too large for a while; else None."""
        busy = [req for _, req in self.active()]
        if not busy or self._in_flight is None:  # the last of them ended while its surplus step was on its way
            return None
        wanted = self._bucket(len(busy), max(req.ring_pages for req in busy))
        smaller = wanted[0] < self.size[0] or wanted[1] < self.size[1]
        self._oversized = self._oversized + 1 if smaller else 0
        return wanted if self._oversized > _SHRINK_AFTER and alone else None

    def _bucket(self, rows: int, pages: int) -> tuple[int, int]:
        return bucket(rows, self._runner.buckets.rows), bucket(pages, self._runner.buckets.pages)

    def resize(self, rows: int, pages: int) -> None:
        """Gives the batch another size; no step may be in flight."""
        assert self._in_flight is None
        busy = [row for row, _ in self.active()]
        self._runner.resize(rows, pages, {row: index for index, row in enumerate(busy)})
        self.requests = [self.requests[row] for row in busy] + [None] * (rows - len(busy))
        self._oversized = 0

    def release_memory(self) -> None:
        """Gives an empty batch its least size: nobody needs what many clients needed any more."""
        least = self._bucket(1, 1)
        if least != self.size:
            self.resize(*least)

    # --- steps ----------------------------------------------------------------------------------------------------
    def collect(self) -> list[Ended]:
        """Finds out what the next step depends on; what has ended must leave before it is launched.

        What a row may draw, or that it must not read on, can follow from the token before: then the result of the step in
        flight is waited for. A row that cannot be rewound may read on where nobody keeps it.
        """
        self._started, self._collected = time.perf_counter(), False
        constrained, ended = [(row, req) for row, req in self.active() if req.constraint is not None], list[Ended]()
        all_constrained = bool(constrained) and len(constrained) == len(self)
        self._awaited = [req for _, req in constrained] if all_constrained else []
        kept = any(req.update is not None for _, req in self.active())
        if all_constrained or (kept and not self._runner.capabilities.rewind):
            self._collected = self._in_flight is not None
            ended = self.synchronise()
        gone = {one.row for one in ended}
        return ended + self._look_at_grammars([(row, req) for row, req in constrained if row not in gone])

    def _look_at_grammars(self, constrained: Scheduled) -> list[Ended]:
        """Looks which tokens may come next in the rows under a grammar; those where nothing can have ended."""
        ended = []
        until = time.monotonic() + self._mean_seconds * _GRACE
        for row, req in constrained:
            constraint, decode = req.constraint, req.decode
            if decode.in_flight or constraint is None or constraint.ready:
                continue
            wait = until - time.monotonic() if decode.mask_due else 0.0
            decode.mask_due = False
            try:
                if constraint.look(max(0.0, wait)) and (constraint.complete or len(decode.generated) >= decode.limit):
                    ended.append(Ended(req, _flush(req, "stop" if constraint.complete else "length"), row))
            except EngineError as error:
                ended.append(Ended(req, error, row))
            except Exception:
                log.exception("A grammar failed")
                ended.append(Ended(req, EngineError("The engine could not finish this request"), row))
        return ended

    def step(self) -> tuple[list[Ended], bool]:
        """Launches a step for everyone who still needs one, and delivers what the step before has drawn.

        Returns:
          What has ended, and whether there was a step before, also if `collect` has looked at it.
        """
        if self._awaited:
            wait_for_any([req.constraint for req in self._awaited if req.constraint and not req.done], _PATIENCE)
        before, before_width, width = self._in_flight, self._width, self._choose_width()
        self._width = width
        self._in_flight, scheduled = self._launch(width)
        ended = [] if before is None else self._deliver(*before)
        self._measure(before is not None and not self._collected, before_width)
        for _, req in scheduled:
            req.decode.launch(width)
        delivered = self._collected or before is not None
        if delivered:
            seconds = time.perf_counter() - self._started
            self._counters.steps += 1
            self._counters.step_seconds += seconds
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        return ended, delivered

    def _choose_width(self) -> int:
        """Tokens per row of the next step."""
        rates = [0.0 if req.constraint is not None else req.decode.record.rate for _, req in self.active()]
        return self._widths.choose(self.size[0], self._runner.widths, rates) if rates else self._runner.width

    def _measure(self, delivered: bool, width: int) -> None:
        """Takes note of how long a step took that followed another one at once."""
        now, last = time.perf_counter(), self._ready_at
        self._ready_at = (now, self.size) if delivered and self._in_flight is not None else None
        if delivered and last is not None and last[1] == self.size:
            self._widths.measured(self.size[0], width, now - last[0])

    def _launch(self, width: int) -> tuple[tuple[StepOutput, Scheduled] | None, Scheduled]:
        scheduled = [
            (row, req)
            for row, req in self.active()
            if len(req.decode.generated) + req.certain < req.decode.limit
            and (req.constraint is None or req.constraint.ready)
        ]
        if not scheduled:
            return None, []
        wanted, pages = np.zeros(len(self.requests), np.int32), dict[int, NewPage]()
        for row, req in scheduled:
            if req.page_due:
                pages[row] = req.begin_page(self._runner.capabilities, self._counters)
            wanted[row] = min(width, req.decode.limit - len(req.decode.generated) - req.certain)
        return (self._runner.decode(wanted, self._allowed(scheduled, wanted), pages, width), scheduled), scheduled

    def _allowed(self, scheduled: Scheduled, wanted: np.ndarray) -> np.ndarray | None:
        """Which tokens may come next, a bit each; None where all may.

        A row under a grammar takes no drafts: what may follow them is not known in time.
        """
        allowed = None
        for row, req in scheduled:
            if req.constraint is not None:
                allowed = self._runner.allow_all() if allowed is None else allowed
                wanted[row] = 1
                req.constraint.allow(allowed[row])
        return allowed

    # --- results --------------------------------------------------------------------------------------------------
    def settle(self) -> list[Ended]:
        """To be called before a row leaves that has not ended: one that cannot be rewound must not have read further."""
        return [] if self._runner.capabilities.rewind else self.synchronise()

    def synchronise(self) -> list[Ended]:
        """Waits for the step in flight, if there is one, and delivers what it has drawn."""
        before, self._in_flight = self._in_flight, None
        return [] if before is None else self._deliver(*before)

    def _deliver(self, output: StepOutput, scheduled: Scheduled) -> list[Ended]:
        integers, floats = np.asarray(output.integers), np.asarray(output.floats)
        before, ended = self._counters.generated_tokens, []
        for row, req in scheduled:
            req.decode.in_flight = 0
            if req.done:
                continue
            outcome: FinishReason | EngineError | None
            try:
                outcome = self._take(req, integers[row], floats[row])
            except EngineError as error:
                outcome = error
            except Exception:
                log.exception("A request failed while its answer was delivered")
                outcome = EngineError("The engine could not finish this request")
            if outcome is not None:
                ended.append(Ended(req, outcome, row))
        self._count_rate(self._counters.generated_tokens - before)
        return ended

    def _take(self, req: RequestState, integers: np.ndarray, floats: np.ndarray) -> FinishReason | None:
        """Takes what a step has drawn for one row; why the answer ends with it, if it does."""
        tokens = integers[:, 0]
        fed, drawn = int((tokens != NONE).sum()), int((tokens >= 0).sum())
        req.decode.verify(fed, drawn)
        if drawn:
            req.decode.record.note(fed, tokens[:drawn].tolist(), integers[0, 1 + TOP_LOGPROBS :].tolist())
        for index in range(drawn):
            req.cursor.position += 1
            reason = self._take_token(req, integers[index], floats[index])
            if reason is not None:
                return reason
        return None

    def _take_token(self, req: RequestState, integers: np.ndarray, floats: np.ndarray) -> FinishReason | None:
        token, request, decode = int(integers[0]), req.request, req.decode
        if not decode.generated:
            req.answered = time.monotonic()
        decode.generated.append(token)
        self._counters.generated_tokens += 1
        gate = float(floats[1])
        if req.memory is not None:
            req.memory.gate(gate)
        if token in self._tokenizer.eog_ids and not request.ignore_eos:
            req.send(req.detokenizer.finish())
            return "stop"
        info = None
        if request.with_tokens:
            wanted = request.sampling.logprobs or 0
            top = integers[1 : 1 + wanted], floats[2 : 2 + wanted]
            info = token_info(self._tokenizer, token, float(floats[0]), *top, gate=gate if request.gated else None)
        req.send(req.detokenizer.push(token, info))
        if req.detokenizer.matched is not None:
            return "stop"
        if req.constraint is not None:  # whether it is complete is known when its grammar has seen the token
            req.constraint.take(token)
            decode.mask_due = True
            return None
        return _flush(req, "length") if len(decode.generated) >= decode.limit else None

    def _count_rate(self, tokens: int) -> None:
        now = time.monotonic()
        self._rate_tokens += tokens
        if now - self._rate_from >= 1.0:
            self._counters.tokens_per_second = self._rate_tokens / (now - self._rate_from)
            self._rate_from, self._rate_tokens = now, 0


def _flush(req: RequestState, reason: FinishReason) -> FinishReason:
    """Sends the text that stop strings have held back, at an answer's end; why it ends then."""
    req.send(req.detokenizer.finish())
    return "stop" if req.detokenizer.matched is not None else reason
