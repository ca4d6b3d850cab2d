"""Prompts in prefill: which is next, what is read of it, and how much of that beside running answers.

A prompt is prefilled in chunks that end at page boundaries, and a chunk in steps: the write of the memory, then one group of
layers after the other. Which chunks there are follows from the prompt alone, for programs of other shapes round otherwise;
what runs between two steps is free. Runs on the engine's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

from atlas_jax.engine.api import TokenInfo
from atlas_jax.engine.runner.base import ModelRunner, PrefillStep
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.runner.step_inputs import memory_settings
from atlas_jax.engine.scheduler.detokenizer import token_info
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.request_state import RequestState
from atlas_jax.gguf import Tokenizer

_OLDEST_EVERY = 4
"""Of so many prefill steps one is of the prompt that has waited longest, the others of the one with least left to read: a
question of twenty tokens does not wait for a book, and the book is read."""
MAX_IN_FLIGHT = 2
"""Prefill steps in flight while nobody decodes: one that runs, and one that keeps the device busy while the host looks
around. Without a bound XLA takes 32 programs, and a short prompt that comes then waits for them."""
_MOST = 8
"""Prefill steps beside one decode step at most."""
_MEASURE_AFTER = 16
"""Decode steps with prefill beside them in a row after which one goes without, to learn anew how long it takes."""
_WEIGHT = 0.25
"""Of the newest duration in the mean."""


class PrefillPace:
    """Divides the device's time between decode and prefill, half to each.

    The device works through what it is given in order, so a decode step that is launched behind some prefill steps makes
    every answer wait for both. What both take is learned from the time between results.
    """

    def __init__(self) -> None:
        self._decode: dict[tuple[int, int], float] = {}  # seconds of a step by the batch's size
        self._prefill = 0.0
        self._credit = 0.0
        self._launched = deque([0, 0], maxlen=2)  # prefill steps beside the decode step before and beside this one
        self._last: float | None = None
        self._in_a_row = 0

    def steps(self, size: tuple[int, int]) -> int:
        """How many prefill steps may go beside the next decode step of a batch of this size (rows, pages)."""
        decode = self._decode.get(size)
        if decode is None or self._in_a_row >= _MEASURE_AFTER:
            return 0
        if not self._prefill:
            return 1
        # one, or as many as take about as long as the decode step
        return min(int(self._credit / self._prefill), max(1, round(decode / self._prefill)), _MOST)

    def observe(self, size: tuple[int, int], launched: int, now: float, *, delivered: bool) -> None:
        """Takes note of a decode step and the prefill steps that were launched beside it.

        Args:
          now: the time.
          delivered: whether the decode step before it has ended just now.
        """
        self._launched.append(launched)
        self._in_a_row = self._in_a_row + 1 if launched else 0
        before, self._last = self._last, now if delivered else None
        if before is None or not delivered:
            return
        took, beside, decode = now - before, self._launched[0], self._decode.get(size)
        if not beside:
            self._decode[size] = decode = took if decode is None else decode + _WEIGHT * (took - decode)
        elif decode is not None:
            prefill = max(took - decode, decode / 10) / beside
            self._prefill = prefill if not self._prefill else self._prefill + _WEIGHT * (prefill - self._prefill)
        if decode is not None:
            self._credit = min(self._credit + decode - launched * self._prefill, decode + self._prefill)


class PrefillQueue:
    """The prompts in prefill, each in a row of its own."""

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, counters: Counters) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._counters = counters
        self._queue: deque[RequestState] = deque()  # the one that has waited longest first
        self._chunks: dict[RequestState, Iterator[PrefillStep]] = {}
        self._in_flight: deque[jax.Array] = deque()
        self._steps = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._queue)

    def add(self, req: RequestState) -> None:
        """Takes a request in, whose row is where its pending tokens go on."""
        self._queue.append(req)

    def settle(self, req: RequestState) -> None:
        """To be called before a prompt leaves that is not read to its end: a row that cannot be rewound must not have read a
        part of a chunk."""
        while req in self._chunks and not self._runner.capabilities.rewind:
            self.step(req)

    def remove(self, req: RequestState) -> None:
        """Forgets a request; its row stays as far as whole chunks have been read."""
        self._queue.remove(req)
        self._chunks.pop(req, None)

    def clear(self) -> None:
        """Forgets all."""
        self._queue.clear()
        self._chunks.clear()

    @property
    def ready(self) -> list[RequestState]:
        """Those of which nothing is left to read."""
        return [req for req in self._queue if not req.left]

    def next(self) -> RequestState:
        """The request whose prompt is read next; there must be one."""
        self._steps += 1
        req = min(self._queue, key=lambda req: req.left) if self._steps % _OLDEST_EVERY else self._queue[0]
        self._queue.remove(req)
        self._queue.append(req)
        return req

    def has_room(self, limit: int, *, wait: bool) -> bool:
        """Whether less than `limit` steps are in flight; waits until it is so, or only looks."""
        while self._in_flight and (_has_run(self._in_flight[0]) or (wait and len(self._in_flight) >= limit)):
            made = self._in_flight.popleft()
            if not made.is_deleted():
                made.block_until_ready()
        return len(self._in_flight) < limit

    def step(self, req: RequestState) -> None:
        """Launches the next step of a prompt of which something is left."""
        chunk = self._chunks.get(req)
        if chunk is None:
            chunk = self._chunks[req] = self._chunk(req)
        step = next(chunk)
        req.prefill.row = step.row
        self._in_flight.append(step.made)
        if step.done:
            del self._chunks[req]
            req.prefill.pooled = step.pooled
            self._finish_chunk(req, step.scores)

    def _chunk(self, req: RequestState) -> Iterator[PrefillStep]:
        """The steps of the next chunk: up to the end of the page."""
        runner, row, wanted = self._runner, req.prefill.row, req.request.prompt_logprobs
        assert row is not None
        page = req.begin_page(runner.capabilities, self._counters) if req.needs_page else None
        tokens, following = req.chunk()
        settings = memory_settings(req.request.memory, *req.memory_shape)
        if req.request.pooling is not None:
            before = req.prefill.pooled
            pooled = np.zeros((1, runner.embed), np.float32) if before is None else before
            return runner.prefill_pooled(row, settings, tokens, pooled, page, mean=req.request.pooling == "mean")
        if wanted is None:
            return runner.prefill(row, settings, tokens, page)
        following += tokens[-1:] * (len(tokens) - len(following))
        return runner.prefill_scored(row, settings, tokens, following, page, alternatives=wanted > 0)

    def _finish_chunk(self, req: RequestState, scores: StepOutput | None) -> None:
        """Takes note of a chunk that has been read."""
        tokens, following = req.chunk()
        if scores is not None:
            self._keep_scores(req, scores, following)
        req.advance(tokens)
        self._counters.prompt_tokens += len(tokens)

    def _keep_scores(self, req: RequestState, scores: StepOutput, following: list[int]) -> None:
        integers, floats = np.asarray(scores.integers), np.asarray(scores.floats)
        logprobs = self.logprobs(req)
        wanted = req.request.prompt_logprobs or 0
        for index, token in enumerate(following):
            top = integers[index, 1 : 1 + wanted], floats[index, 2 : 2 + wanted]
            logprobs.append(token_info(self._tokenizer, token, float(floats[index, 0]), *top))

    def embedding(self, req: RequestState) -> np.ndarray:
        """What has been pooled of a prompt that has been read, at length 1."""
        vector = np.asarray(req.prefill.pooled, np.float32)[0]
        return vector / max(float(np.linalg.norm(vector)), float(np.finfo(np.float32).tiny))

    def logprobs(self, req: RequestState) -> list[TokenInfo]:
        """What has been scored of a prompt; nothing comes before its first token, so that has no score."""
        if not req.prefill.logprobs:
            req.prefill.logprobs.append(token_info(self._tokenizer, req.request.prompt[0], None, (), ()))
        return req.prefill.logprobs


def _has_run(made: jax.Array) -> bool:
    return made.is_deleted() or bool(made.is_ready())  # type: ignore[attr-defined]
