"""PrefillQueue that are being read: whose turn it is, what is read next, and how much of it beside streams.

A prompt is read in pieces that end at page boundaries, and a piece in parts: the write of the memory, then one group of
layers after the other. Which pieces there are follows from the prompt alone, for programs of other shapes round otherwise;
what runs between two parts is free. Runs on the engine's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.runner.base import ModelRunner, PrefillStep
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.runner.step_inputs import memory_settings
from atlas_jax.engine.scheduler.detokenizer import token_info
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.request_state import RequestState
from atlas_jax.engine.scheduler.resume import begin_page
from atlas_jax.gguf import Tokenizer

_IN_TURN = 4
"""Of so many parts one is of the prompt that has waited longest, the others of the one with least left to read: a question
of twenty tokens does not wait for a book, and the book is read."""
AHEAD = 2
"""Parts that may be on their way while nobody decodes: one that runs, and one that keeps the device busy while the host looks
around. Without a bound XLA takes 32 programs, and a short prompt that comes then waits for them."""
_MOST = 8
"""Parts read in one turn at most."""
_MEASURE_AFTER = 16
"""Turns with reading in a row after which one goes without, to learn anew how long a step takes."""
_WEIGHT = 0.25
"""Of the newest duration in the mean."""


class PrefillPace:
    """Divides the time between streams and prompts, half to each.

    The device works through what it is given in order, so a turn that launches a step behind some parts makes every stream
    wait for both. What both take is learned from the time between results.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[int, int], float] = {}
        self._part = 0.0
        self._credit = 0.0
        self._launched = deque([0, 0], maxlen=2)  # parts of the turn before and of this one
        self._last: float | None = None
        self._reading = 0

    def parts(self, size: tuple[int, int]) -> int:
        """How many parts may be read in this turn beside streams in a batch of this size (rows, pages)."""
        step = self._steps.get(size)
        if step is None or self._reading >= _MEASURE_AFTER:
            return 0
        if not self._part:
            return 1
        # one, or as many as take about as long as a step
        return min(int(self._credit / self._part), max(1, round(step / self._part)), _MOST)

    def turned(self, size: tuple[int, int], parts: int, now: float, *, landed: bool) -> None:
        """Takes note of a turn: `parts` were launched in it, and at `now` a step of streams has ended if one `landed`."""
        self._launched.append(parts)
        self._reading = self._reading + 1 if parts else 0
        before, self._last = self._last, now if landed else None
        if before is None or not landed:
            return
        took, behind, step = now - before, self._launched[0], self._steps.get(size)
        if not behind:
            self._steps[size] = step = took if step is None else step + _WEIGHT * (took - step)
        elif step is not None:
            part = max(took - step, step / 10) / behind
            self._part = part if not self._part else self._part + _WEIGHT * (part - self._part)
        if step is not None:
            self._credit = min(self._credit + step - parts * self._part, step + self._part)


class PrefillQueue:
    """The prompts that are being read, each in a row of its own."""

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, counters: Counters) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._counters = counters
        self._queue: deque[RequestState] = deque()  # the one that has waited longest first
        self._pieces: dict[RequestState, Iterator[PrefillStep]] = {}
        self._ahead: deque[jax.Array] = deque()
        self._parts = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._queue)

    def add(self, req: RequestState) -> None:
        """Takes a prompt in, whose row is where its `pending_tokens` goes on."""
        self._queue.append(req)

    def remove(self, req: RequestState) -> None:
        """Forgets a prompt; its row stays as far as whole pieces of it have been read."""
        self._queue.remove(req)
        self._pieces.pop(req, None)

    def clear(self) -> None:
        """Forgets all."""
        self._queue.clear()
        self._pieces.clear()

    @property
    def ready(self) -> list[RequestState]:
        """Those of which nothing is left to read."""
        return [req for req in self._queue if not _left(req)]

    def next(self) -> RequestState:
        """The prompt whose turn it is; there must be one."""
        self._parts += 1
        req = min(self._queue, key=_left) if self._parts % _IN_TURN else self._queue[0]
        self._queue.remove(req)
        self._queue.append(req)
        return req

    def has_room(self, ahead: int, *, wait: bool) -> bool:
        """Whether less than `ahead` parts are on their way; waits until it is so, or only looks."""
        while self._ahead and (_has_run(self._ahead[0]) or (wait and len(self._ahead) >= ahead)):
            made = self._ahead.popleft()
            if not made.is_deleted():
                made.block_until_ready()
        return len(self._ahead) < ahead

    def read(self, req: RequestState) -> None:
        """Launches the next part of a prompt of which something is left."""
        piece = self._pieces.get(req)
        if piece is None:
            piece = self._pieces[req] = self._piece(req)
        part = next(piece)
        req.row = part.row
        self._ahead.append(part.made)
        if part.done:
            del self._pieces[req]
            self._took(req, part.scores)

    def _piece(self, req: RequestState) -> Iterator[PrefillStep]:
        """Reads up to the end of the page."""
        assert req.row is not None
        runner, row = self._runner, req.row
        if req.needs_page:
            row = runner.grow_row(row, req.plan.ring(req.position + 1))
            turn, write = begin_page(runner, self._counters, req)
            row = runner.start_page(row, turn, write)
            if row.memory is not None and write is not None and turn.absorb_end is not None:
                yield PrefillStep(row, row.memory.loss, done=False)
        tokens, following = _piece_of(req)
        settings = memory_settings(req.request.memory, *req.memory_shape)
        if req.request.prompt_logprobs is None:
            yield from runner.prefill(row, settings, tokens)
        else:
            following += tokens[-1:] * (len(tokens) - len(following))
            alternatives = req.request.prompt_logprobs > 0
            yield from runner.prefill_scored(row, settings, tokens, following, alternatives=alternatives)

    def _took(self, req: RequestState, scores: StepOutput | None) -> None:
        """Takes note of a piece that has been read."""
        tokens, following = _piece_of(req)
        if scores is not None:
            self._keep_scores(req, scores, following)
        if req.kept is not None:
            req.kept.history.extend(tokens)
            req.kept.pending = None
        req.position += len(tokens)
        req.prefilled += len(tokens)
        self._counters.prompt_tokens += len(tokens)

    def _keep_scores(self, req: RequestState, packed: StepOutput, following: list[int]) -> None:
        integers, numbers = np.asarray(packed.integers), np.asarray(packed.numbers)
        if not req.scored:
            req.scored.append(token_info(self._tokenizer, req.request.prompt[0], None, (), ()))
        wanted = req.request.prompt_logprobs or 0
        for index, token in enumerate(following):
            top = integers[index, 1 : 1 + wanted], numbers[index, 2 : 2 + wanted]
            req.scored.append(token_info(self._tokenizer, token, float(numbers[index, 0]), *top))


def _left(req: RequestState) -> int:
    """Tokens of a prompt that are to be read before it joins the batch."""
    whole = req.limit == 0  # nothing will be generated: the last token is read like the others
    return max(0, len(req.pending_tokens) - req.prefilled - (not whole))


def _piece_of(req: RequestState) -> tuple[list[int], list[int]]:
    """The tokens that are read next, up to the end of the page, and the one after each as far as there is one."""
    end = req.prefilled + min(_left(req), PAGE - req.position % PAGE)
    return req.pending_tokens[req.prefilled : end], req.pending_tokens[req.prefilled + 1 : end + 1]


def _has_run(made: jax.Array) -> bool:
    return made.is_deleted() or bool(made.is_ready())  # type: ignore[attr-defined]
