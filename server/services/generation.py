"""One generation request from admission to the last byte: admission, limits, engine, encoding, and settling the account."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import NoReturn

import msgspec
from msgspec import UNSET

from atlas_jax.engine.api import (
    Delta,
    Embedded,
    EngineError,
    Event,
    Finished,
    InvalidRequest,
    MemoryParams,
    Prompt,
    SnapshotInvalid,
)
from server.admission import Admission, Admitted
from server.errors import BadRequest, ContextExceeded, ServerError, Unavailable, problem
from server.middleware.rate_limits import KeyLimits
from server.middleware.request_context import PARTY, RequestContext
from server.prometheus import Metrics
from server.schemas.usage import Usage
from server.services.engine_supervisor import EngineSupervisor
from server.services.generation_plan import GenerationPlan
from server.services.request_group import RequestGroup
from server.services.response_builder import (
    Ending,
    Outcome,
    atlas_stats_of,
    finish_reason,
    timings_of,
    usage_of,
)
from server.services.runtime_config import RuntimeConfig
from server.services.stats import Outcome as RequestOutcome
from server.services.stats import ServerStats

log = logging.getLogger("atlas.server")
NO_CONTEXT = "No available ATLAS contexts"
_encode = msgspec.json.Encoder().encode


class Generator:
    """Starts generations.

    Args:
      admission: places for sequences.
      contexts: memory contexts for those of them that use the memory.
    """

    def __init__(
        self,
        *,
        supervisor: EngineSupervisor,
        admission: Admission,
        contexts: Admission,
        limits: KeyLimits,
        stats: ServerStats,
        metrics: Metrics,
        config: RuntimeConfig,
        ping_interval: float,
        max_answer_tokens: int,
    ) -> None:
        self.supervisor, self.admission, self.contexts, self.limits = supervisor, admission, contexts, limits
        self.stats, self.metrics, self.config = stats, metrics, config
        self.ping_interval, self.max_answer_tokens = ping_interval, max_answer_tokens

    async def start(self, plan: GenerationPlan, context: RequestContext) -> Generation:
        """Admits a request and hands it to the engine; everything it holds is released by `context.cleanup`."""
        generation = Generation(self, plan, context)
        context.cleanup.append(generation.close)
        await generation.start()
        return generation


class Generation:
    """One running request; read it once, with `events` if the client asked for a `stream`, else with `whole`."""

    def __init__(self, generator: Generator, plan: GenerationPlan, context: RequestContext) -> None:
        self._in = generator
        self._plan = plan
        self._context = context
        requests = plan.requests(context.identity.owner, generator.max_answer_tokens)
        self._party = PARTY.get()
        self._group = RequestGroup(
            generator.supervisor,
            requests,
            width=plan.memory.batch_size,
            more=self._more,
            degraded=plan.memory.degraded,
        )
        self._count = len(requests)
        self._place: Admitted | None = None
        self._context_place: Admitted | None = None
        self._waited = 0.0
        self._reserved = 0
        self._last_delta = 0.0
        self._outcome: RequestOutcome = "cancelled"
        generator.stats.begin()

    async def start(self) -> None:
        """Waits for a place and submits; raises what stands in the way."""
        key_id = self._context.identity.key_id
        try:
            estimate = self._plan.estimate(self._in.max_answer_tokens)
            self._in.limits.reserve(key_id, estimate)
            self._reserved = estimate
            await self._take_place()
            if self._plan.memory.params is not None:
                await self._take_context(self._plan.memory.params)
            await self._group.start()
        except Exception as error:
            self._fail(error)

    async def _take_place(self) -> None:
        self._place = await self._in.admission.acquire(self._party)
        self._waited += self._place.waited

    async def _take_context(self, memory: MemoryParams) -> None:
        """Takes a memory context; without one, a request that has no session runs on the plain model.

        A session's answer would silently forget, so it waits, and keeps no place from requests that need no context.
        """
        self._context_place = self._in.contexts.more(self._party)
        if self._context_place is not None:
            return
        if memory.session is None:
            log.warning("[ATLAS] %s: a request without a session runs on the plain model", NO_CONTEXT)
            self._group.degrade(NO_CONTEXT)
            return
        assert self._place is not None
        self._place.release()
        self._place = None
        self._context_place = await self._in.contexts.acquire(self._party)
        self._waited += self._context_place.waited
        await self._take_place()

    def _more(self) -> Admitted | None:
        """A place for one more sequence, with a memory context if the others have one; None where it has to wait."""
        place = self._in.admission.more(self._party)
        if place is None or self._context_place is None:
            return place
        context = self._in.contexts.more(self._party)
        if context is None:
            place.release()
            return None
        return place.joined(context)

    async def whole(self) -> bytes:
        """The whole response as JSON."""
        outcomes = await self.outcomes()
        try:
            answer = self._plan.builder.whole(outcomes, self._usage(), self._ending())
            await self._commit()
        except Exception as error:
            self._fail(error)
        self._outcome = "completed"
        return _encode(answer)

    async def outcomes(self) -> list[Outcome]:
        """What every sequence has come to."""
        outcomes = [Outcome() for _ in range(self._count)]
        try:
            while not self._group.done:
                for index, event in await self._group.next(self._in.ping_interval):
                    outcome = outcomes[index]
                    if isinstance(event, Delta):
                        self._note_delta()
                        outcome.deltas.append(event)
                    elif isinstance(event, Prompt):
                        outcome.prompt = event.tokens
                    elif isinstance(event, Embedded):
                        outcome.embedding = event.vector
                    elif isinstance(event, Finished):
                        outcome.finished = event
        except Exception as error:
            self._fail(error)
        return outcomes

    def complete(self) -> None:
        """Counts the request as completed; for whoever writes its `outcomes` himself."""
        self._outcome = "completed"

    async def _commit(self) -> None:
        if self._plan.commit is not None:
            await self._plan.commit()

    @property
    def media_type(self) -> str:
        """Of a stream."""
        return self._plan.wire.media_type

    @property
    def stream(self) -> bool:
        """Whether the client asked for a stream."""
        return self._plan.stream

    async def events(self) -> AsyncIterator[bytes]:
        """The frames of a stream; an error before the first one is raised, a later one is a frame."""
        wire, sent, opened = self._plan.wire, False, False
        try:
            while not self._group.done:
                events = await self._group.next(self._in.ping_interval)
                if events:
                    opening = () if opened else wire.opening()
                    opened = True
                    chunk = b"".join([*map(wire.frame, opening), *self._frames(events)])
                else:
                    chunk = wire.ping
                if self._group.done:
                    await self._commit()
                if chunk:
                    yield chunk
                    sent = True
        except Exception as error:
            if not sent:
                self._fail(error)
            seen = self._failed(error)
            if not isinstance(seen, ServerError | EngineError):
                log.error("Request %s failed in its stream", self._context.request_id, exc_info=error)
            yield wire.frame(wire.error(problem(seen)))
            return
        self._outcome = "completed"
        last = wire.frame(self._plan.builder.usage(self._usage())) if self._plan.include_usage else b""
        if last or wire.done:
            yield last + wire.done

    def close(self) -> None:
        """Cancels what still runs, gives back what was taken, and counts the request; called once, at the very end."""
        self._group.close()
        for place in (self._context_place, self._place):
            if place is not None:
                place.release()
        if self._reserved:
            ended = self._group.finished.values()
            used = sum(done.prompt_tokens + done.completion_tokens for done in ended)
            self._in.limits.settle(self._context.identity.key_id, self._reserved, used)
        added = self._added_seconds()
        self._in.stats.end(
            self._outcome,
            added_ms=None if added is None else round(added * 1000, 3),
            request_id=self._context.request_id,
        )
        self._observe(added)
        if added is not None and self._plan.memory.params is not None and self._in.config.values.log_atlas_operations:
            stats = atlas_stats_of(self._group.finished, self._plan.choices)
            log.info(
                "[ATLAS] Request processed in %.1fms (memory_layers=%d, cache_hit=%s)",
                added * 1000,
                self._plan.memory.params.memory_layers,
                "true" if stats is not UNSET and stats.cache_hit else "false",
            )

    def _frames(self, events: Sequence[tuple[int, Event]]) -> list[bytes]:
        builder = self._plan.builder
        chunks: list[msgspec.Struct] = []
        for index, event in events:
            if isinstance(event, Delta):
                self._note_delta()
            if isinstance(event, Delta | Prompt):
                chunks += builder.chunks(index, event)
            elif isinstance(event, Finished):
                # Several sequences may end in one batch; the ending belongs to the last chunk of all.
                last = self._group.done and event is next(reversed(self._group.finished.values()))
                chunks += builder.end(index, finish_reason(event), self._ending() if last else None)
        return [self._plan.wire.frame(chunk) for chunk in chunks]

    def _usage(self) -> Usage:
        return usage_of(self._group.finished, self._plan.choices)

    def _ending(self) -> Ending:
        ended = self._group.finished
        return Ending(
            timings=timings_of(ended.values()),
            atlas_stats=atlas_stats_of(ended, self._plan.choices),
            usage=self._usage(),
            stop=next((done.stop for done in ended.values() if done.stop is not None), None),
        )

    def _failed(self, error: Exception) -> Exception:
        """Notes the failure and returns the error a client should see."""
        self._outcome = "failed"
        if isinstance(error, SnapshotInvalid):
            return Unavailable("The memory of this session cannot be read", code="memory_unavailable", retry_after=30.0)
        if isinstance(error, InvalidRequest) and error.code == "context_length_exceeded":
            return ContextExceeded(
                str(error),
                param=self._named(error.param),
                prompt_tokens=max(len(prompt) for prompt in self._plan.prompts),
                context=self._in.supervisor.engine.model.context_length,
            )
        if isinstance(error, InvalidRequest) and error.param != self._named(error.param):
            return BadRequest(str(error), param=self._named(error.param), code=error.code)
        return error

    def _named(self, param: str | None) -> str | None:
        """A field of the engine's request as the client knows it."""
        return self._plan.field if param == "prompt" else param

    def _fail(self, error: Exception) -> NoReturn:
        """Raises the error a client should see."""
        seen = self._failed(error)
        if seen is error:
            raise error
        raise seen from error

    def _note_delta(self) -> None:
        now = time.perf_counter()
        if self._last_delta:
            self._in.metrics.inter_token.observe(now - self._last_delta)
        else:
            self._in.metrics.first_token.observe(now - self._context.arrived)
        self._last_delta = now

    def _added_seconds(self) -> float | None:
        """What the server added: from the arrival to the engine, and from the engine's end to the last byte."""
        if self._outcome != "completed" or self._place is None:
            return None
        before = self._group.submitted_at - self._context.arrived - self._context.receiving - self._waited
        return max(0.0, before) + max(0.0, time.perf_counter() - self._group.last_end)

    def _observe(self, added: float | None) -> None:
        metrics = self._in.metrics
        metrics.outcomes.labels(self._outcome).inc()
        for done in self._group.finished.values():
            metrics.finished.labels(finish_reason(done)).inc()
        if added is not None and self._place is not None:
            metrics.added.observe(added)
            metrics.latency.observe(time.perf_counter() - self._context.arrived)
            queued = max((done.queue_seconds for done in self._group.finished.values()), default=0.0)
            metrics.queue.observe(self._waited + queued)
