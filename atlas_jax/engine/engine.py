"""The engine: a GGUF model, the memory of its sessions and a thread that serves them. Implements `api.EngineProtocol`."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from atlas_jax import _platform
from atlas_jax.config import ConfigError
from atlas_jax.engine import cache_folder
from atlas_jax.engine.adapter_finder import NOT_FITTED, FittingStopped
from atlas_jax.engine.api import (
    AnswerShape,
    CallGrammar,
    ChatFrame,
    EngineStats,
    Fitting,
    GenerationRequest,
    Handle,
    InvalidRequest,
    Listener,
    LoraInfo,
    MemoryParams,
    MemoryUnavailable,
    ModelInfo,
    Overloaded,
    SessionStore,
    SlotInfo,
    TemplateFacts,
)
from atlas_jax.engine.chat import Chat
from atlas_jax.engine.check_request import check_lora, check_request
from atlas_jax.engine.compile_cache import CompileCounter, use_cache
from atlas_jax.engine.config import EngineConfig
from atlas_jax.engine.fitting import BackgroundFit
from atlas_jax.engine.host_memory import resident_bytes
from atlas_jax.engine.hosts.group import Group, join
from atlas_jax.engine.kernels import kernels_of
from atlas_jax.engine.loader import Opened, open_model
from atlas_jax.engine.scheduler.metrics import Counters, together
from atlas_jax.engine.scheduler.request_state import RequestState, new_request_state
from atlas_jax.engine.scheduler.scheduler import Scheduler
from atlas_jax.engine.scheduler.structured_output import Grammar, Grammars
from atlas_jax.engine.serving import Serving
from atlas_jax.engine.sessions.documents import Documents
from atlas_jax.engine.sessions.lora import lora_scales
from atlas_jax.engine.sessions.storage import open_storage
from atlas_jax.engine.sessions.store import Storage
from atlas_jax.engine.sessions.table import SessionTable
from atlas_jax.progress import Progress

log = logging.getLogger("atlas.engine")

_EXIT_SECONDS = 120.0
_LOOK_SECONDS = 0.05


class Engine:
    """Serves one model; make it with `Engine.open`."""

    def __init__(
        self,
        config: EngineConfig,
        opened: Opened,
        storage: Storage | None,
        compilations: CompileCounter,
        group: Group | None = None,
    ) -> None:
        """Use `Engine.open`."""
        self._group = group
        self.config = config
        self.tokenizer = opened.tokenizer
        self._storage, self._compilations, self._kernels = storage, compilations, kernels_of(config)
        self._chat = Chat(opened.tokenizer, opened.template)
        self._longest_prompt = opened.longest_prompt
        self._grammars = Grammars(opened.tokenizer)
        self._draining = False
        self._close_lock, self._submit_lock = threading.Lock(), threading.Lock()
        self._prepare: list[Callable[[SessionStore], None]] = []
        keeps = opened.layout is not None or opened.fit is not None
        self._documents = Documents(storage.store(opened.info.fingerprint) if storage is not None and keeps else None)
        self._serving = self._new_serving(opened)
        self._leaving: tuple[Serving, ...] = ()
        """What served before there was a memory, until its last request has ended."""
        self._earlier: tuple[Counters, ...] = ()
        self._lora = tuple(one.scale for one in opened.info.lora)
        self._fit = None if opened.fit is None else BackgroundFit(self._fitted(opened.fit), self._busy)

    def _new_serving(self, opened: Opened) -> Serving:
        return Serving.of(self.config, opened, self._storage, self._documents, self._wake)

    @classmethod
    def open(cls, config: EngineConfig | None = None, *, group: Group | None = None, **fields: Any) -> Engine:
        """Loads a model, fits or finds its memory, compiles, and starts serving.

        A model that no memory can be fitted to is served without: `model.memory_unavailable` says so. With
        `calibrate_in_background` so is one until its memory has been fitted; `fitting` tells how far that is.

        Args:
          config: what to open; None takes the fields alone.
          group: the processes that share the mesh, where they have found one another already; else they do it now.
          fields: fields of `EngineConfig`, in place of those of `config`.

        Raises:
          ConfigError: a field is out of its range, the model cannot be divided so, or there are too few devices; the
            message names the field.
          HostsError: the other processes are gone, or have opened something else.
          HubError: the model cannot be had from its repository.
          GGUFError, UnsupportedModel, AdapterError, LoraError: a file cannot be used; the message names what is wrong.
        """
        config = EngineConfig(**fields) if config is None else dataclasses.replace(config, **fields)
        if group is None and config.several_processes:
            group = join(config)
        if group is not None and group.process_id:
            raise ConfigError(
                f"process_id is {group.process_id}: only process 0 has an engine, the others follow it with "
                "`atlas_jax.engine.hosts.group.follow_process_0`"
            )
        _platform.limit_threads(config.threads)
        _platform.limit_lapack()
        cache = cache_folder.usable(config.cache_folder)
        if cache is not None:
            use_cache(cache / "compiled")
        compilations = CompileCounter()
        # first: loading a model takes seconds, and another server's folder is no use
        storage = None
        if config.memory_enabled and (config.memory_path is not None or config.session_store):
            storage = open_storage(
                config.memory_path,
                config.session_store,
                endpoint=config.session_store_endpoint,
                copies=config.l3_cache_size,
            )
        try:
            with kernels_of(config).scope():
                opened = open_model(config, cache)
            _platform.self_test()
            if group is not None:
                opened = dataclasses.replace(opened, runner=group.lead(config, opened))
            engine = cls(config, opened, storage, compilations, group)
        except BaseException:
            if storage is not None:
                storage.close()
            raise
        engine._serving.start()
        if engine._fit is not None:
            engine._fit.start()
        # threads still in XLA when the interpreter goes away crash the process
        atexit.register(engine.close, timeout=_EXIT_SECONDS)
        return engine

    # --- requests -------------------------------------------------------------------------------------------------
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; control tokens come from the template alone, never from message text.

        Raises:
          InvalidRequest: the model's template refuses the messages, or cannot be used at all.
        """
        return self._chat.tokens(messages, tools=tools, begin_answer=add_generation_prompt, variables=variables)

    @property
    def template(self) -> TemplateFacts:
        """What the model's chat template can do."""
        return self._chat.facts

    def chat_frame(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatFrame:
        """What the template puts around these messages, for requests that go on with a session."""
        return self._chat.frame(messages, variables, tools)

    def apply_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """A conversation as the template writes it, for people to read; raises InvalidRequest."""
        return self._chat.text(messages, **kwargs)

    def answer_grammar(self, shape: AnswerShape, *, owner: str = "") -> Future[Grammar]:
        """A grammar of answers of a shape; see `api.EngineProtocol.answer_grammar`."""
        return self._grammars.answers(shape, owner=owner)

    def call_grammar(self, calls: CallGrammar, *, owner: str = "") -> Future[Grammar]:
        """A grammar of answers with tool calls; see `api.EngineProtocol.call_grammar`."""
        return self._grammars.calls(calls, owner=owner)

    def submit(self, request: GenerationRequest, listener: Listener) -> Handle:
        """Queues a request; what it takes and raises is said at `api.EngineProtocol.submit`."""
        scheduler = self._serving.scheduler
        if self._draining or not scheduler.alive:
            raise Overloaded("The engine is not accepting requests", retry_after=5.0)
        free = self.config.max_concurrent - scheduler.running
        if scheduler.waiting >= self.config.max_waiting + free:
            raise Overloaded("Too many requests are waiting", retry_after=1.0)
        tokens = self._check(request)
        digests = [one.digest for one in self.model.lora]
        lora = lora_scales(digests, self._lora if request.lora is None else request.lora)
        state = new_request_state(request, tokens, listener, self.tokenizer, lora)
        with self._submit_lock:  # once another serves, this one gets no more
            scheduler = self._serving.scheduler
            scheduler.submit(state)
        return _Submitted(state, scheduler)

    def check_memory(self, memory: MemoryParams) -> None:
        """Raises InvalidRequest for settings of the memory that every request with them would be refused for."""
        if self._serving.table is None:
            raise self._no_memory()
        self._serving.runner.check(memory)

    def _check(self, request: GenerationRequest) -> np.ndarray:
        """Refuses what can never succeed, or would crash a compiled step; the prompt as an array."""
        model, longest = self.model, self._longest_prompt
        tokens = check_request(request, vocab=model.vocab_size, longest=longest, adapters=len(model.lora))
        if request.memory is not None:
            self.check_memory(request.memory)
            if request.prompt_logprobs is not None and request.memory.session is not None:
                raise InvalidRequest("log-probabilities of a prompt are not available in a session", param="echo")
        return tokens

    # --- what an embedding program can ask -------------------------------------------------------------------------
    @property
    def model(self) -> ModelInfo:
        """Facts of the model."""
        return self._serving.info

    @property
    def lora(self) -> tuple[LoraInfo, ...]:
        """The LoRA adapters, with the scales of requests that say nothing of them."""
        known = zip(self.model.lora, self._lora, strict=True)
        return tuple(dataclasses.replace(one, scale=scale) for one, scale in known)

    def scale_lora(self, scales: Sequence[float]) -> None:
        """Changes these scales, see `api.EngineProtocol.scale_lora`."""
        check_lora(scales, len(self._lora))
        self._lora = tuple(map(float, scales))

    @property
    def sessions(self) -> SessionTable:
        """The sessions; raises MemoryUnavailable in an engine without memory."""
        table = self._serving.table
        if table is None:
            raise self._no_memory()
        return table

    @property
    def documents(self) -> Documents:
        """What a server keeps for owners; see `api.EngineProtocol.documents`."""
        return self._documents

    def _no_memory(self) -> MemoryUnavailable:
        return MemoryUnavailable(self.model.memory_unavailable or "ATLAS not enabled")

    def stats(self) -> EngineStats:
        """Counters since start, and gauges of this moment."""
        serving, leaving = self._serving, self._leaving
        counters = together([*self._earlier, serving.scheduler.counters])
        table = None if serving.table is None else serving.table.tiers
        running = sum(one.scheduler.running for one in (*leaving, serving))
        return EngineStats(
            requests_total=counters.requests,
            requests_running=running + (0 if table is None else table.pending),
            requests_waiting=sum(one.scheduler.waiting for one in (*leaving, serving)),
            requests_completed=counters.completed,
            requests_failed=counters.failed,
            requests_cancelled=counters.cancelled,
            prompt_tokens_total=counters.prompt_tokens,
            cached_tokens_total=counters.cached_tokens,
            generated_tokens_total=counters.generated_tokens,
            drafted_tokens_total=counters.drafted_tokens,
            accepted_tokens_total=counters.accepted_tokens,
            tokens_per_second=counters.tokens_per_second if running else 0.0,
            steps_total=counters.steps,
            step_seconds_total=counters.step_seconds,
            compilations_total=self._compilations.count,
            sessions_device=0 if table is None else table.count("device"),
            sessions_host=0 if table is None else table.count("host"),
            sessions_disk=0 if table is None else table.count("disk"),
            session_hits=0 if table is None else table.counters.hits,
            session_misses=0 if table is None else table.counters.misses,
            memory_updates_total=counters.memory_updates,
            muon_iterations_total=counters.muon_iterations,
            writes_skipped_total=counters.writes_skipped,
            omega_loss_total=counters.omega_losses,
            omega_loss=counters.omega_loss,
            memory_utilization=counters.memory_utilization,
            window_fill_ratio=counters.window_fill,
            kept_pairs=counters.kept_pairs,
            kept_pairs_capacity=counters.kept_pairs_capacity,
            state=counters.state,
            memory_saves=0 if table is None else table.counters.saves,
            memory_loads=0 if table is None else table.counters.loads,
            snapshot_failures=0 if table is None else table.counters.failures,
            session_conflicts=0 if table is None else table.counters.conflicts,
            memory_bytes=resident_bytes(),
        )

    def slots(self) -> tuple[SlotInfo, ...]:
        """The decode slots."""
        slots = self._serving.scheduler.slots()
        leaving = [slot for one in self._leaving for slot in one.scheduler.slots() if slot.busy]
        return (*slots, *(dataclasses.replace(slot, id=len(slots) + index) for index, slot in enumerate(leaving)))

    def alive(self) -> bool:
        """False once the engine's thread has died, or one of the processes that share its devices."""
        if self._group is not None and self._group.failure is not None:
            return False
        return self._serving.scheduler.alive and all(one.scheduler.failure is None for one in self._leaving)

    def warm_up(self, timeout: float | None = None) -> bool:
        """Waits until every program is compiled, from when on nothing compiles; tells whether it is so."""
        return self._serving.warm_up.wait(timeout)

    # --- a memory that is fitted later -----------------------------------------------------------------------------
    def fitting(self) -> Fitting | None:
        """How far a memory is that is being fitted to the model, which is served without until then; else None."""
        return None if self._fit is None else self._fit.state()

    def before_memory(self, prepare: Callable[[SessionStore], None]) -> None:
        """Has `prepare` called with the sessions once a memory has been fitted, on a thread, before any request has it."""
        self._prepare.append(prepare)

    def _busy(self) -> bool:
        return self._serving.busy or any(one.busy for one in self._leaving)

    def _fitted(self, fit: Callable[[Progress], Opened]) -> Callable[[BackgroundFit], None]:
        def work(progress: BackgroundFit) -> None:
            before = self._serving
            try:
                with self._kernels.scope():
                    opened = fit(progress)
                if opened.layout is None:
                    self._serving = dataclasses.replace(before, info=opened.info)
                    return
                self._go_on_with(opened, progress)
            except Exception as error:
                if not isinstance(error, FittingStopped):
                    info = dataclasses.replace(before.info, memory_unavailable=NOT_FITTED)
                    self._serving = dataclasses.replace(before, info=info)
                raise
            log.info("[ATLAS] The memory has been fitted; requests can use it from now on")
            progress.finished()
            while before.busy:  # its requests go on as they began
                progress.pause(_LOOK_SECONDS)
            before.end(_EXIT_SECONDS)
            self._leaving = ()

        return work

    def _go_on_with(self, opened: Opened, progress: BackgroundFit) -> None:
        """Has new requests be served by the model with its memory, once the first programs are compiled."""
        before = self._serving
        progress("compiling", 0.0)
        before.warm_up.stop(_EXIT_SECONDS)
        serving = self._new_serving(opened)
        try:
            serving.start()
            assert serving.table is not None
            for prepare in self._prepare:
                prepare(serving.table)
            progress.between()
            with self._submit_lock:
                if self._draining:  # `close` ends what serves now
                    raise FittingStopped
                self._leaving, self._earlier = (before,), (before.scheduler.counters,)
                self._serving = serving
        except BaseException:
            serving.end(_EXIT_SECONDS)
            raise

    def drain(self) -> None:
        """Refuses new requests from now on; running ones go on."""
        self._draining = True

    def close(self, *, timeout: float) -> None:
        """Ends what still runs, keeping its sessions, and the thread; brings every answered turn to the disk; idempotent."""
        self.drain()
        # what serves may use up all of its time, as it waits for a program that is compiled; then the others are told
        others = 0.0 if self._group is None else timeout / 2
        until = time.monotonic() + timeout - others
        with self._close_lock:
            if self._fit is not None:
                self._fit.stop(timeout / 2)
            with self._submit_lock:
                everything = (*self._leaving, self._serving)
            for serving in everything:
                serving.end(max(until - time.monotonic(), 0.0))
            if self._serving.table is None and self._storage is not None:
                self._storage.close()
            self._grammars.close()
            if self._group is not None:
                self._group.end(others)
        atexit.unregister(self.close)

    def _wake(self) -> None:
        self._serving.scheduler.wake()


class _Submitted:
    """A request under way."""

    def __init__(self, state: RequestState, scheduler: Scheduler) -> None:
        self._state = state
        self._scheduler = scheduler

    def cancel(self) -> None:
        """Ends it at the next step."""
        if not self._state.done:
            self._state.cancelled.set()
            self._scheduler.wake()
