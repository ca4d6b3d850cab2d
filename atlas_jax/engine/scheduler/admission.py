"""Requests that wait: which may start now, and where it goes on from. Runs on the engine's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

from atlas_jax.engine.api import EngineError, InvalidRequest, MemoryParams, MemoryUnavailable
from atlas_jax.engine.runner.base import ModelRunner
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.scheduler.prefix_cache import PrefixCache
from atlas_jax.engine.scheduler.request_queue import FairQueue
from atlas_jax.engine.scheduler.request_state import DecodeProgress, Ended, RequestState
from atlas_jax.engine.scheduler.resume import Start, same_shape, start_new, start_plain, start_session
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.tiers import SessionTiers
from atlas_jax.gguf import Tokenizer

log = logging.getLogger("atlas.engine")


class Admission:
    """The waiting requests, first come, first served within an owner.

    Args:
      context: tokens of the longest plain request.
      answer: tokens of an answer that names no limit.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        sessions: SessionTiers | None,
        prefixes: PrefixCache,
        *,
        context: int,
        answer: int,
    ) -> None:
        self._runner = runner
        self._bos = tokenizer.bos_id if tokenizer.add_bos else None
        self._sessions = sessions
        self._prefixes = prefixes
        self._context = context
        self._answer = answer
        self._waiting: FairQueue[RequestState] = FairQueue()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._waiting)

    def add(self, req: RequestState) -> None:
        """Takes a request in."""
        self._waiting.push(req.request.owner, req)

    def remove(self, req: RequestState) -> None:
        """Forgets a request."""
        self._waiting.remove(req)

    def next(self, prefilling: Iterable[RequestState]) -> RequestState | Ended | None:
        """The next request that can start, with its session taken; one whose session cannot be had has ended.

        Args:
          prefilling: those in prefill, whose prefixes are worth waiting for.
        """
        error: EngineError | None = None

        def ready(req: RequestState) -> bool:
            nonlocal error
            try:
                return self._ready(req, prefilling)
            except Exception as problem:
                if isinstance(problem, EngineError):
                    error = problem
                else:
                    log.exception("A session could not be taken")
                    error = MemoryUnavailable("The session's memory cannot be read", retry_after=5.0)
                return True

        req = self._waiting.take(ready)
        return req if req is None or error is None else Ended(req, error)

    def _ready(self, req: RequestState, prefilling: Iterable[RequestState]) -> bool:
        """Whether a request can start; takes its session if it can."""
        if self._prefixes.budget and any(other.prefills_for(req) for other in prefilling):
            return False
        memory = req.request.memory
        if memory is None or memory.session is None or self._sessions is None:
            return True
        req.lease = self._sessions.acquire(memory.session, req.submitted)
        return req.lease is not None

    def start(self, req: RequestState) -> None:
        """Finds where a request goes on from, and gives it a row.

        Raises:
          InvalidRequest: it contradicts its session, or the model has no room for it.
        """
        req.admitted = time.monotonic()
        request = req.request
        length, memory = len(request.prompt), request.memory
        limit = self._answer if request.max_tokens is None else request.max_tokens
        if memory is None:
            limit = min(limit, self._context - length)
            start = start_plain(self._runner, self._prefixes, req)
        else:
            start = self._start_memory(req, memory)
        req.ring_pages = self._runner.ring_pages(start.cursor.plan, length + limit)
        if memory is not None:
            limit = self._fit_context(start, limit)
        req.cursor, req.prefill, req.memory, req.update = start.cursor, start.prefill, start.memory, start.update
        req.decode = DecodeProgress(limit)

    def _start_memory(self, req: RequestState, memory: MemoryParams) -> Start:
        shape = self._runner.shape(memory, req.lora)
        lease = req.lease
        if lease is None:
            return start_new(self._runner, req, shape, MemoryWrite.from_params(memory, shape))
        session = lease.session
        if session is not None and session.tokens:
            shape = same_shape(session.shape, shape, memory.given, lora=req.request.lora is not None)
        write = MemoryWrite.from_params(memory, shape)
        return start_session(self._runner, req, session or Session(lease.key, shape), shape, write, self._bos)

    def _fit_context(self, start: Start, limit: int) -> int:
        """The limit of a session's answer where the model has no room for more.

        Raises:
          InvalidRequest: there is none for the prompt.
        """
        context = self._runner.capabilities.session_context
        if context is None:
            return limit
        tokens = start.cursor.position + len(start.prefill.pending_tokens)
        room = context - tokens
        if room < 0 or (room == 0 and limit):
            raise InvalidRequest(
                f"This model's maximum context length is {context} tokens, all of which it attends to, and the session would "
                f"have {tokens}",
                param="prompt",
                code="context_length_exceeded",
            )
        return min(limit, room)
