"""One request on its way through the engine: waiting, in prefill, in the decode batch.

Each part of its state has one place that changes it: `admission` makes them all, `prefill` advances `PrefillProgress`,
`decode_batch` advances `DecodeProgress`, `MemoryAccount` counts by its own methods, and `endings` closes.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import (
    EngineError,
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
from atlas_jax.engine.runner.base import Capabilities, NewPage
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.scheduler.detokenizer import Detokenizer
from atlas_jax.engine.scheduler.memory_account import MemoryAccount
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.speculation import DraftRecord
from atlas_jax.engine.scheduler.structured_output import Constraint
from atlas_jax.engine.sessions.entry import SessionLease
from atlas_jax.engine.sessions.lora import LoraScales
from atlas_jax.engine.sessions.session import Session
from atlas_jax.gguf import Tokenizer
from atlas_jax.model.page_schedule import PageSchedule

log = logging.getLogger("atlas.engine")


@dataclass
class Cursor:
    """Where a request stands in its text.

    Attributes:
      position: of the next token to be read, after the last step whose result is known.
      start: position it went on from.
      page: the last page that has begun.
    """

    plan: PageSchedule = field(default_factory=lambda: PageSchedule(window=None))
    position: int = 0
    page: int = -1
    start: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.position

    def begins_page(self, position: int) -> bool:
        """Whether the token at `position` begins a page."""
        return position % PAGE == 0 and self.page < position // PAGE

    def begin_page(self) -> int:
        """Begins the next page; how many leave the window for it."""
        self.page += 1
        return self.plan.left(self.page) - self.plan.left(self.page - 1)


@dataclass
class PrefillProgress:
    """A prompt on its way into the KV cache.

    Attributes:
      row: where it is read into; None before admission and in the decode batch.
      pending_tokens: what is to be read; the last is left to the first decode step, unless nothing is generated.
      done: how many of them have been read.
      cached: tokens of the prompt that were read before.
      logprobs: what has been scored of it.
      pooled: its embedding so far; None before the first chunk.
    """

    row: Sequences | None = None
    pending_tokens: list[int] = field(default_factory=list)
    done: int = 0
    cached: int = 0
    logprobs: list[TokenInfo] = field(default_factory=list)
    pooled: jax.Array | None = None

    @property
    def rest(self) -> list[int]:
        """What has not been read yet."""
        return self.pending_tokens[self.done :]

    def take_row(self) -> Sequences | None:
        """Gives its row away."""
        row, self.row = self.row, None
        return row


@dataclass
class DecodeProgress:
    """An answer as far as the decode batch has drawn it.

    Attributes:
      limit: tokens it may have.
      prompt_end: position of the prompt's last token once it has joined the batch, −1 before.
      launched: steps it took part in.
      in_flight: tokens per row of the step in flight if it takes part in it, else 0.
      drafted, accepted: draft tokens it was fed, and those that it kept.
      mask_due: whether its grammar has been given a token, or begun, and its mask not been waited for since.
      generated: the tokens drawn.
      record: how its drafts have turned out.
    """

    limit: int = 0
    prompt_end: int = -1
    launched: int = 0
    in_flight: int = 0
    drafted: int = 0
    accepted: int = 0
    mask_due: bool = True
    generated: list[int] = field(default_factory=list)
    record: DraftRecord = field(default_factory=DraftRecord)

    @property
    def read(self) -> int:
        """Position up to which its text is to stay read once decoding ends.

        The last drawn token has not been read; the step in flight may have read it, which rewinding the row undoes.
        """
        return self.prompt_end + (len(self.generated) or min(self.launched, 1))

    def launch(self, width: int) -> None:
        """Accounts for a step of `width` tokens per row that is in flight now."""
        self.launched += 1
        self.in_flight = width

    def verify(self, fed: int, drawn: int) -> None:
        """Accounts for the draft tokens of a step that fed `fed` tokens and drew `drawn`."""
        self.drafted += max(0, fed - 1)
        self.accepted += max(0, drawn - 1)


@dataclass(frozen=True)
class SessionUpdate:
    """What a request does to its session.

    Attributes:
      session: the session it goes on as; its history grows with the prefill.
      effect: what the prompt did to what the session held.
      hit: whether a state of it was gone on from.
      keep, new, repeats: tokens of its text that stay, what follows them before the answer, and whether those that stay are
        the prompt's own first ones.
    """

    session: Session
    effect: HistoryEffect
    hit: bool
    keep: int
    new: list[int]
    repeats: bool

    def extend(self, tokens: list[int]) -> None:
        """Takes note of tokens that have been read."""
        self.session.history.extend(tokens)
        self.session.pending = None


@dataclass(eq=False)
class RequestState:
    """A request and everything the engine's thread knows of it.

    Attributes:
      tokens: the prompt as an array.
      lora: the LoRA adapters to read it with, where it does not go on with a session.
      constraint: what the answer must match, as far as it has come.
      submitted, admitted, answered: when it came, left the queue, and drew its first token.
      ring_pages: pages of KV cache that its whole text needs.
      memory: None for the plain model.
      update: None without a session.
    """

    request: GenerationRequest
    tokens: np.ndarray
    listener: Listener
    seed: int
    detokenizer: Detokenizer
    lora: LoraScales = ()
    constraint: Constraint | None = None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    answered: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: bool = False
    lease: SessionLease | None = None
    ring_pages: int = 1
    cursor: Cursor = field(default_factory=Cursor)
    prefill: PrefillProgress = field(default_factory=PrefillProgress)
    decode: DecodeProgress = field(default_factory=DecodeProgress)
    memory: MemoryAccount | None = None
    update: SessionUpdate | None = None

    @property
    def memory_shape(self) -> tuple[int, int]:
        """Layers and degree of its memory; any valid ones if it has none."""
        return (1, 2) if self.memory is None else (self.memory.shape.layers, self.memory.shape.degree)

    @property
    def reuses(self) -> bool:
        """Whether it takes and leaves whole pages of its prompt as a shared prefix."""
        request = self.request
        whole = request.prompt_logprobs is not None or request.pooling is not None  # every token's state is needed
        return request.reuse and request.memory is None and not whole

    def prefills_for(self, other: RequestState) -> bool:
        """Whether all whole pages of its prompt are a prefix of another's, which gets them once they are prefilled.

        So the choices of one request, and clients that ask the same at once, prefill a prompt once. Prompts are prefilled one
        chunk at a time, so waiting costs the other nothing.
        """
        mine, theirs = self.request.prompt, other.request.prompt
        shared = (len(mine) - 1) // PAGE * PAGE
        if self.lora != other.lora or not (
            self.reuses and other.reuses and self.request.owner == other.request.owner and 0 < shared < len(theirs)
        ):
            return False
        # the last token first: it tells most texts apart that begin with the same template
        return mine[shared - 1] == theirs[shared - 1] and list(mine[:shared]) == list(theirs[:shared])

    # --- prefill --------------------------------------------------------------------------------------------------
    @property
    def left(self) -> int:
        """Tokens of the prompt that are to be read before it joins the decode batch, whose first step reads the last one."""
        return max(0, len(self.prefill.pending_tokens) - self.prefill.done - (self.decode.limit > 0))

    def chunk(self) -> tuple[list[int], list[int]]:
        """The tokens of the next chunk, up to the end of the page, and the one after each as far as there is one."""
        start, pending = self.prefill.done, self.prefill.pending_tokens
        end = start + min(self.left, PAGE - self.cursor.position % PAGE)
        return pending[start:end], pending[start + 1 : end + 1]

    def advance(self, tokens: list[int]) -> None:
        """Takes note of prompt tokens that have been read."""
        if self.update is not None:
            self.update.extend(tokens)
        self.cursor.position += len(tokens)
        self.prefill.done += len(tokens)

    # --- pages ----------------------------------------------------------------------------------------------------
    @property
    def needs_page(self) -> bool:
        """Whether the token at its position begins a page."""
        return self.cursor.begins_page(self.cursor.position)

    def begin_page(self, capabilities: Capabilities, counters: Counters) -> NewPage:
        """Accounts for the page that begins with the next token; what the runner has to do."""
        cursor, memory, write = self.cursor, self.memory, None
        left = cursor.begin_page()
        if memory is not None:
            write = memory.write_at(cursor.position)
            if left:
                passes = capabilities.muon_passes if write.optimizer == "muon" else 0
                memory.absorb(left * PAGE, passes)
                counters.memory_updates += 1
                counters.muon_iterations += passes
        return NewPage(cursor.plan.next_page(cursor.page), cursor.plan.ring(cursor.position + 1), write)

    # --- decode ---------------------------------------------------------------------------------------------------
    @property
    def certain(self) -> int:
        """How many tokens the step in flight draws for sure: none if it met the end of the page."""
        return 0 if self.decode.in_flight == 0 or self.needs_page else 1

    @property
    def page_due(self) -> bool:
        """Whether the next step begins a page. After a step with drafts that is known once its result is."""
        exact = self.decode.in_flight <= 1 or self.needs_page
        return exact and self.cursor.begins_page(self.cursor.position + self.certain)

    # --- listener -------------------------------------------------------------------------------------------------
    def send(self, event: Event | None) -> None:
        """Tells the listener, if there is something to tell; its failure is not the engine's, and ends the request."""
        if event is None:
            return
        try:
            self.listener(event)
        except Exception:
            log.exception("A listener failed")
            self.cancelled.set()

    def fail(self, error: EngineError) -> None:
        """Ends it with an error."""
        self.done = True
        self.send(Failed(error))

    def finished(self, reason: FinishReason, memory: MemoryStats | None) -> Finished:
        """The last event."""
        now = time.monotonic()
        admitted = self.admitted or now
        answered = self.answered or now
        return Finished(
            reason=reason,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=len(self.decode.generated),
            cached_tokens=self.prefill.cached,
            drafted_tokens=self.decode.drafted,
            accepted_tokens=self.decode.accepted,
            seed=self.seed,
            stop=self.detokenizer.matched,
            queue_seconds=admitted - self.submitted,
            prompt_seconds=answered - admitted,
            decode_seconds=now - answered,
            memory=memory,
        )


class Ended(NamedTuple):
    """A request that has come to its end.

    Attributes:
      outcome: why, or what went wrong.
      row: its row in the decode batch, or None.
    """

    req: RequestState
    outcome: FinishReason | EngineError
    row: int | None = None


def new_request_state(
    request: GenerationRequest, tokens: np.ndarray, listener: Listener, tokenizer: Tokenizer, lora: LoraScales = ()
) -> RequestState:
    """A request that has just arrived, its prompt as an array, and the LoRA adapters it is to use."""
    seed = request.sampling.seed
    return RequestState(
        request=request,
        tokens=tokens,
        listener=listener,
        seed=secrets.randbits(63) if seed is None else seed & ((1 << 64) - 1),
        constraint=None if request.grammar is None else request.grammar.begin(),
        detokenizer=Detokenizer(tokenizer, request.stop, with_tokens=request.with_tokens, shown=request.shown),
        lora=lora,
    )
