"""One request on its way through the engine: waiting, being read, being answered."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    HistoryEffect,
    Listener,
    MemoryStats,
    TokenInfo,
)
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.scheduler.detokenizer import Detokenizer
from atlas_jax.engine.scheduler.structured_output import Constraint
from atlas_jax.engine.sessions.entry import SessionLease
from atlas_jax.engine.sessions.session import Session, SessionShape
from atlas_jax.gguf import Tokenizer
from atlas_jax.model.page_schedule import PageSchedule

log = logging.getLogger("atlas.engine")


@dataclass(eq=False)
class RequestState:
    """A request and everything the engine's thread knows of it.

    Attributes:
      tokens: the prompt as an array.
      history: what the prompt did to what its session holds.
      shape, write: of its memory, or None for the plain model.
      feed, fed: prompt tokens to be read, and how many of them have been; the last one is fed by the first decode step.
      position: position of the next token to be read or fed, after the last step whose result is known.
      began: position from which it reads on.
      in_flight: tokens per row of the step in flight if it takes part in it, else 0.
      page: the last page that has begun.
      prompt_end: position of the prompt's last token once it has joined the decode batch, −1 before.
      ring_pages: ring slots it needs.
      row: its state while the prompt is being read.
      kept: session it goes on as when it ends, or None.
      keep, new, repeats: tokens of its session's text that stay, what follows them before the answer, and whether they are
        the prompt's own first ones.
      replayed: how the memory is written while text is read that came before this request: to which position, and how.
      absorbed, written: tokens its memory has taken in, in all and in this request.
      constraint: what the answer must match, as far as it has come.
      fresh: whether the constraint has been given a token, or begun, and not been waited for since.
    """

    request: GenerationRequest
    tokens: np.ndarray
    listener: Listener
    seed: int
    detokenizer: Detokenizer
    submitted: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    lease: SessionLease | None = None
    kept: Session | None = None
    keep: int = 0
    new: list[int] = field(default_factory=list)
    repeats: bool = False
    replayed: deque[tuple[int, MemoryWrite]] = field(default_factory=deque)
    constraint: Constraint | None = None
    fresh: bool = True
    shape: SessionShape | None = None
    write: MemoryWrite | None = None
    pending_tokens: list[int] = field(default_factory=list)
    prefilled: int = 0
    position: int = 0
    began: int = 0
    page: int = -1
    prompt_end: int = -1
    ring_pages: int = 1
    row: Sequences | None = None
    cached: int = 0
    history: HistoryEffect = "new"
    cache_hit: bool = False
    absorbed: int = 0
    written: int = 0
    updates: int = 0
    muon_iterations: int = 0
    limit: int = 0
    launched: int = 0
    in_flight: int = 0
    drafted: int = 0
    accepted: int = 0
    generated: list[int] = field(default_factory=list)
    scored: list[TokenInfo] = field(default_factory=list)
    gate_sum: float = 0.0
    gate_count: int = 0
    started: float = 0.0
    prefilled_at: float = 0.0
    done: bool = False

    @property
    def plan(self) -> PageSchedule:
        """Its window."""
        return PageSchedule(window=None) if self.shape is None else self.shape.plan

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Layers and degree of its memory; any valid ones if it has none."""
        return (1, 2) if self.shape is None else (self.shape.layers, self.shape.degree)

    @property
    def reuses(self) -> bool:
        """Whether it takes and leaves whole pages of its prompt."""
        request = self.request
        return request.reuse and request.memory is None and request.prompt_logprobs is None

    def reads_for(self, other: RequestState) -> bool:
        """Whether all whole pages it reads are the beginning of another's prompt, which gets them once they are read.

        So the choices of one request, and clients that ask the same at once, read a prompt once. PrefillQueue are read one chunk
        at a time, so waiting costs the other nothing.
        """
        mine, theirs = self.request.prompt, other.request.prompt
        shared = (len(mine) - 1) // PAGE * PAGE
        if not (
            self.reuses and other.reuses and self.request.owner == other.request.owner and 0 < shared < len(theirs)
        ):
            return False
        # the last token first: it tells most texts apart that begin with the same template
        return mine[shared - 1] == theirs[shared - 1] and list(mine[:shared]) == list(theirs[:shared])

    @property
    def needs_page(self) -> bool:
        """Whether the token at `position` begins a page."""
        return self._begins_page(self.position)

    @property
    def certain(self) -> int:
        """How many tokens the step in flight draws for sure: none if it met the end of the page."""
        return 0 if self.in_flight == 0 or self.needs_page else 1

    @property
    def page_due(self) -> bool:
        """Whether the next step begins a page. After a step with drafts that is known once its result is."""
        exact = self.in_flight <= 1 or self.needs_page
        return exact and self._begins_page(self.position + self.certain)

    def _begins_page(self, position: int) -> bool:
        return position % PAGE == 0 and self.page < position // PAGE

    @property
    def read_tokens(self) -> int:
        """Position up to which its text is to stay read once decoding ends.

        The last drawn token has not been read; the step in flight may have read it, which setting the row back undoes.
        """
        return self.prompt_end + (len(self.generated) or min(self.launched, 1))

    def write_now(self) -> MemoryWrite | None:
        """How the memory is written when the page begins that `position` is in."""
        while self.replayed and self.replayed[0][0] <= self.position:
            self.replayed.popleft()
        return self.replayed[0][1] if self.replayed else self.write

    def begin_page(self, muon_passes: int) -> bool:
        """Accounts for the next page, which begins now; tells whether the memory is written with it."""
        self.page += 1
        left = self.plan.left(self.page) - self.plan.left(self.page - 1)
        if left == 0 or self.write is None:
            return False
        self.absorbed += left * PAGE
        self.written += left * PAGE
        self.updates += 1
        self.muon_iterations += muon_passes
        return True

    def skip(self, writes: int) -> None:
        """Takes back what `begin_page` has accounted for writes that were not taken."""
        if writes and self.updates:
            lost = round(self.written * writes / self.updates)
            self.absorbed, self.written, self.updates = self.absorbed - lost, self.written - lost, self.updates - writes

    def account(self, read: int) -> None:
        """Accounts for a memory that is written with every token, up to position `read`."""
        self.written = self.updates = read - self.began
        self.absorbed = read

    def send(self, event: Event) -> None:
        """Tells the listener; its failure is not the engine's, and ends the request."""
        try:
            self.listener(event)
        except Exception:
            log.exception("A listener failed")
            self.cancelled.set()

    def fail(self, failure: Failed) -> None:
        """Ends it with an error."""
        self.done = True
        self.send(failure)

    def finished(self, reason: FinishReason, memory: MemoryStats | None) -> Finished:
        """The last event."""
        now = time.monotonic()
        started = self.started or now
        prefilled_at = self.prefilled_at or now
        return Finished(
            reason=reason,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=len(self.generated),
            cached_tokens=self.cached,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            seed=self.seed,
            stop=self.detokenizer.matched,
            queue_seconds=started - self.submitted,
            prompt_seconds=prefilled_at - started,
            decode_seconds=now - prefilled_at,
            memory=memory,
        )


def new_request_state(
    request: GenerationRequest, tokens: np.ndarray, listener: Listener, tokenizer: Tokenizer
) -> RequestState:
    """A request that has just arrived, and its prompt as an array."""
    seed = request.sampling.seed
    return RequestState(
        request=request,
        tokens=tokens,
        listener=listener,
        seed=secrets.randbits(63) if seed is None else seed & ((1 << 64) - 1),
        constraint=None if request.grammar is None else request.grammar.begin(),
        detokenizer=Detokenizer(tokenizer, request.stop, with_tokens=request.sampling.logprobs is not None),
    )
