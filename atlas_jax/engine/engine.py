"""The engine: a GGUF model, the memory of its sessions and a thread that serves them. Implements `api.EngineProtocol`."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax import _platform
from atlas_jax.config import ConfigError
from atlas_jax.engine import cache_folder
from atlas_jax.engine.api import (
    ChatFrame,
    EngineStats,
    GenerationRequest,
    Handle,
    InvalidRequest,
    Listener,
    MemoryUnavailable,
    Overloaded,
    SlotInfo,
)
from atlas_jax.engine.compile_cache import CompileCounter, use_cache
from atlas_jax.engine.host_memory import resident_bytes
from atlas_jax.engine.loader import Opened, open_pretrained, open_trained
from atlas_jax.engine.runner.warmup import WarmUp
from atlas_jax.engine.scheduler.request_state import RequestState, new_request_state
from atlas_jax.engine.scheduler.scheduler import Scheduler
from atlas_jax.engine.scheduler.structured_output import Grammar, Grammars
from atlas_jax.engine.sessions.chat_frame import ChatFrames
from atlas_jax.engine.sessions.store import MemoryFolder
from atlas_jax.engine.sessions.table import SessionTable
from atlas_jax.engine.sessions.tiers import Budgets
from atlas_jax.gguf import ChatTemplate, GGUFFile, TemplateError
from atlas_jax.kernels import tpu
from atlas_jax.kernels.attention import KVDtype
from atlas_jax.kernels.cpu import ffi
from atlas_jax.kernels.sampling import BIAS_SLOTS, TOP_LOGPROBS
from atlas_jax.model.lm.export import ARCHITECTURE as TRAINED
from atlas_jax.model.loading import WeightDtype

log = logging.getLogger("atlas.engine")

_EXIT_SECONDS = 120.0


@dataclass(frozen=True)
class Limits:
    """What an engine admits.

    Attributes:
      running: sequences that are read or answered at once.
      waiting: sequences that may wait beyond them.
      context: tokens of the longest plain request.
      window: largest window of a request with memory.
    """

    running: int = 32
    waiting: int = 256
    context: int = 8192
    window: int = 2048


class Engine:
    """Serves one model; make it with `Engine.open`."""

    def __init__(
        self,
        *,
        opened: Opened,
        folder: MemoryFolder | None,
        memory_file: str | None,
        journal_sync: float,
        budgets: Budgets,
        limits: Limits,
        prefix_bytes: int,
        compilations: CompileCounter,
    ) -> None:
        """Use `Engine.open`."""
        info, runner, layout = opened.info, opened.runner, opened.layout
        self.model = info
        self.tokenizer = opened.tokenizer
        self._template = opened.template
        self._frames = ChatFrames(self._render)
        self._runner = runner
        self._limits = limits
        self._compilations = compilations
        self._grammars = Grammars(opened.tokenizer)
        self._draining = False
        self._close_lock = threading.Lock()
        self._table = (
            None
            if layout is None
            else SessionTable(
                layout,
                folder=folder,
                default_file=memory_file or f"{info.name}_memory.atlas",
                budgets=budgets,
                on_idle=self._wake,
                sync_seconds=journal_sync,
            )
        )
        self._scheduler = Scheduler(
            runner,
            opened.tokenizer,
            None if self._table is None else self._table.tiers,
            max_rows=limits.running,
            context=limits.context,
            answer=info.context_length,
            prefix_bytes=prefix_bytes if runner.can_rewind else 0,
        )
        self._warm_up = WarmUp(runner)

    @classmethod
    def open(
        cls,
        *,
        model_path: str | os.PathLike[str],
        adapter_path: str | os.PathLike[str] | None = None,
        memory_enabled: bool = True,
        memory_path: str | os.PathLike[str] | None = None,
        memory_file: str | None = None,
        journal_sync: float = 1.0,
        cache_path: str | os.PathLike[str] | None = None,
        threads: int = 0,
        max_running: int = 32,
        max_waiting: int = 256,
        max_context: int = 8192,
        max_window: int = 2048,
        memory_dim: int | None = None,
        device_cache_bytes: int = 0,
        host_cache_bytes: int = 1 << 30,
        disk_cache_bytes: int = 16 << 30,
        owner_quota_bytes: int | None = None,
        prefix_cache_bytes: int = 256 << 20,
        weight_dtype: WeightDtype = "int8",
        kv_dtype: KVDtype = "int8",
        speculate: bool = True,
        native_kernels: bool = True,
        mesh_data: int = 1,
        mesh_model: int = 1,
    ) -> Engine:
        """Loads a model, fits or finds its memory, compiles, and starts serving.

        A model that no memory can be fitted to is served without: `model.memory_unavailable` says so.

        Args:
          adapter_path: adapter of the memory; None takes the one shipped for the model, or else calibrates once and
            keeps the result in `cache_path`.
          memory_path: folder of stored sessions, for one engine at a time; None keeps sessions in main memory only.
          memory_file: name of the file that many sessions are exported to and imported from (default:
            `<model>_memory.atlas`).
          journal_sync: seconds the disk may be behind what was answered; 0 waits for it before an answer ends. What was
            answered outlives this process in any case.
          owner_quota_bytes: what one owner's sessions and files may take on disk; None is all of `disk_cache_bytes`.
          cache_path: folder for compiled programs, calibrated adapters and successor tables (default:
            `$XDG_CACHE_HOME/atlas-jax`). One that cannot be written costs time at the next start, nothing else.
          threads: CPU threads; 0 takes every core. Takes effect only if JAX has not run anything yet.
          max_context: longest plain request in tokens; the model's own context if that is shorter.
          memory_dim: numbers of a state that the memory's keys keep, a multiple of 8 from 8 to 128; its matrix has the square
            of it in features. None is that of the adapter given, else 96. One that no adapter is there for is fitted.
          prefix_cache_bytes: states of plain prompts kept on the device for prompts that begin the same.
          weight_dtype, kv_dtype: "float32" for both is the reference mode.
          speculate: guess tokens ahead from the text where that is free (`runner.Buckets`). Answers are the same.
          native_kernels: use our kernels: C where a compiler and the processor allow (`kernels.native`), never on a mesh;
            Mosaic on TPUs (`kernels.pallas`).
          mesh_data, mesh_model: devices the rows of a batch, and each layer's heads and columns, are divided over
            (`mesh_layout`).

        Raises:
          ConfigError: the model cannot be divided so, or there are too few devices; the message names the setting.
          GGUFError, UnsupportedModel, AdapterError: a file cannot be used; the message names what is wrong.
        """
        _limit_threads(threads)
        _platform.limit_lapack()
        ffi.use(native_kernels and mesh_data * mesh_model == 1)
        tpu.use(native_kernels)
        cache = cache_folder.usable(Path(cache_path) if cache_path is not None else default_cache())
        if cache is not None:
            use_cache(cache / "compiled")
        compilations = CompileCounter()
        # first: loading a model takes seconds, and another server's folder is no use
        folder = None if memory_path is None or not memory_enabled else MemoryFolder(Path(memory_path))
        try:
            opened = _open_model(
                model_path,
                cache=cache,
                memory=memory_enabled,
                adapter_path=None if adapter_path is None else Path(adapter_path),
                max_running=max_running,
                max_context=max_context,
                max_window=max_window,
                memory_dim=memory_dim,
                weight_dtype=weight_dtype,
                kv_dtype=kv_dtype,
                speculate=speculate,
                mesh_data=mesh_data,
                mesh_model=mesh_model,
            )
            _platform.self_test()
            engine = cls(
                opened=opened,
                folder=folder,
                memory_file=memory_file,
                journal_sync=journal_sync,
                budgets=Budgets(device_cache_bytes, host_cache_bytes, disk_cache_bytes, owner_quota_bytes),
                limits=Limits(max_running, max_waiting, opened.longest_prompt, max_window),
                prefix_bytes=prefix_cache_bytes,
                compilations=compilations,
            )
        except BaseException:
            if folder is not None:
                folder.close()
            raise
        engine._warm_up.start(first_pages=opened.runner.buckets.pages[0])
        engine._scheduler.start()
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
        with _template_errors():
            return self._usable_template().render_tokens(
                self.tokenizer,
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                variables=variables,
            )

    def chat_frame(
        self, messages: Sequence[Mapping[str, Any]], *, variables: Mapping[str, Any] | None = None
    ) -> ChatFrame:
        """What the template puts around these messages, for requests that go on with a session."""
        return self._frames.frame(messages, variables)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], begin_answer: bool, variables: Mapping[str, Any] | None
    ) -> list[int]:
        return self._usable_template().render_tokens(
            self.tokenizer, messages, add_generation_prompt=begin_answer, variables=variables
        )

    def apply_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """A conversation as the template writes it, for people to read; raises InvalidRequest."""
        with _template_errors():
            return self._usable_template().render(messages, **kwargs)

    def _usable_template(self) -> ChatTemplate:
        if isinstance(self._template, TemplateError):
            raise InvalidRequest(
                f"The chat template of this model cannot be used ({self._template}); "
                "/v1/completions takes a prompt as text",
                param="messages",
                code="chat_template_unusable",
            )
        return self._template

    def json_grammar(self, schema: Mapping[str, Any], *, owner: str = "") -> Future[Grammar]:
        """A grammar of the JSON texts a schema allows; see `api.EngineProtocol.json_grammar`."""
        return self._grammars.json(schema, owner=owner)

    def submit(self, request: GenerationRequest, listener: Listener) -> Handle:
        """Queues a request; what it takes and raises is said at `api.EngineProtocol.submit`."""
        if self._draining or not self._scheduler.alive:
            raise Overloaded("The engine is not accepting requests", retry_after=5.0)
        if self._scheduler.waiting >= self._limits.waiting + self._limits.running - self._scheduler.running:
            raise Overloaded("Too many requests are waiting", retry_after=1.0)
        tokens = self._check(request)
        work = new_request_state(request, tokens, listener, self.tokenizer)
        self._scheduler.submit(work)
        return _Submitted(work, self._scheduler)

    def _check(self, request: GenerationRequest) -> np.ndarray:
        """Refuses what can never succeed, or would crash a compiled step; the prompt as an array."""
        prompt, vocab = request.prompt, self.model.vocab_size
        if not len(prompt):
            raise InvalidRequest("prompt must hold at least one token", param="prompt")
        try:
            tokens = np.asarray(prompt, np.int64)
        except OverflowError:
            tokens = np.array([-1])
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise InvalidRequest(f"prompt holds token ids outside 0 … {vocab - 1}", param="prompt")
        tokens = tokens.astype("<i4")
        if request.max_tokens is not None and request.max_tokens < 0:
            raise InvalidRequest("max_tokens must not be negative", param="max_tokens")
        sampling = request.sampling
        if len(sampling.logit_bias) > BIAS_SLOTS:
            raise InvalidRequest(f"logit_bias may have at most {BIAS_SLOTS} entries", param="logit_bias")
        if sampling.logit_bias and not 0 <= min(sampling.logit_bias) <= max(sampling.logit_bias) < vocab:
            raise InvalidRequest(f"logit_bias names token ids outside 0 … {vocab - 1}", param="logit_bias")
        for name, wanted in (("logprobs", sampling.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            if wanted is not None and not 0 <= wanted <= TOP_LOGPROBS:
                raise InvalidRequest(f"{name} must be between 0 and {TOP_LOGPROBS}", param=name)
        if request.memory is None:
            room = self._limits.context - len(prompt)
            if room < 0 or (room == 0 and request.max_tokens != 0):
                raise InvalidRequest(
                    f"The prompt has {len(prompt)} tokens, but this model's context is {self._limits.context}; "
                    "a session with memory has no such limit",
                    param="prompt",
                    code="context_length_exceeded",
                )
            return tokens
        if self._table is None:
            raise self._no_memory()
        if request.prompt_logprobs is not None and request.memory.session is not None:
            raise InvalidRequest("log-probabilities of a prompt are not available in a session", param="echo")
        self._runner.check(request.memory)
        return tokens

    # --- what a host can ask --------------------------------------------------------------------------------------
    @property
    def sessions(self) -> SessionTable:
        """The sessions; raises MemoryUnavailable in an engine without memory."""
        if self._table is None:
            raise self._no_memory()
        return self._table

    def _no_memory(self) -> MemoryUnavailable:
        return MemoryUnavailable(self.model.memory_unavailable or "ATLAS not enabled")

    def stats(self) -> EngineStats:
        """Counters since start, and gauges of this moment."""
        counters, table = self._scheduler.counters, None if self._table is None else self._table.tiers
        running = self._scheduler.running
        return EngineStats(
            requests_total=counters.requests,
            requests_running=running + (0 if table is None else table.pending),
            requests_waiting=self._scheduler.waiting,
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
            session_hits=0 if table is None else table.hits,
            session_misses=0 if table is None else table.misses,
            memory_updates_total=counters.memory_updates,
            muon_iterations_total=counters.muon_iterations,
            writes_skipped_total=counters.writes_skipped,
            omega_loss_total=counters.omega_losses,
            omega_loss=counters.omega_loss,
            memory_utilization=counters.memory_utilization,
            window_fill_ratio=counters.window_fill,
            memory_saves=0 if table is None else table.saves,
            memory_loads=0 if table is None else table.loads,
            snapshot_failures=0 if table is None else table.failures,
            memory_bytes=resident_bytes(),
        )

    def slots(self) -> tuple[SlotInfo, ...]:
        """The decode slots."""
        return self._scheduler.slots()

    def alive(self) -> bool:
        """False once the engine's thread has died."""
        return self._scheduler.alive

    def warm_up(self, timeout: float | None = None) -> bool:
        """Waits until every program is compiled, from when on nothing compiles; tells whether it is so."""
        return self._warm_up.wait(timeout)

    def drain(self) -> None:
        """Refuses new requests from now on; running ones go on."""
        self._draining = True

    def close(self, *, timeout: float) -> None:
        """Ends what still runs, keeping its sessions, and the thread; brings every answered turn to the disk; idempotent."""
        self.drain()
        until = time.monotonic() + timeout
        with self._close_lock:
            if not self._scheduler.stop(timeout):
                log.error("The engine's thread did not end within %.0f s", timeout)
            if self._table is not None:
                self._table.close(max(until - time.monotonic(), 0.0))
            self._grammars.close()
        self._warm_up.stop(max(until - time.monotonic(), 0.0))
        atexit.unregister(self.close)

    def _wake(self) -> None:
        self._scheduler.wake()


@contextmanager
def _template_errors() -> Iterator[None]:
    """What a template refuses is the request's fault."""
    try:
        yield
    except TemplateError as error:
        raise InvalidRequest(str(error), param="messages") from error


class _Submitted:
    """A request under way."""

    def __init__(self, work: RequestState, loop: Scheduler) -> None:
        self._work = work
        self._scheduler = loop

    def cancel(self) -> None:
        """Ends it at the next step."""
        if not self._work.done:
            self._work.cancelled.set()
            self._scheduler.wake()


def _open_model(
    path: str | os.PathLike[str],
    *,
    cache: Path | None,
    memory: bool,
    adapter_path: Path | None,
    max_running: int,
    max_context: int,
    max_window: int,
    memory_dim: int | None,
    weight_dtype: WeightDtype,
    kv_dtype: KVDtype,
    speculate: bool,
    mesh_data: int,
    mesh_model: int,
) -> Opened:
    """Opens a file of either kind; arguments and errors as for `Engine.open`."""
    with GGUFFile.open(path) as file:
        if file.require("general.architecture", str) == TRAINED:
            if mesh_data * mesh_model != 1:
                raise ConfigError("mesh_data and mesh_model must be 1: a model with its own memory runs on one device")
            if memory and memory_dim is not None:
                raise ConfigError("memory_dim cannot be set: this model was trained with a memory of its own")
            return open_trained(file, max_running=max_running, max_context=max_context, sessions=memory)
        return open_pretrained(
            file,
            cache=cache,
            memory=memory,
            adapter_path=adapter_path,
            max_running=max_running,
            max_context=max_context,
            max_window=max_window,
            memory_dim=memory_dim,
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            speculate=speculate,
            mesh_data=mesh_data,
            mesh_model=mesh_model,
        )


def _limit_threads(threads: int) -> None:
    if threads > 0:
        os.environ["PJRT_NPROC"] = str(threads)  # read when JAX makes its CPU client


def default_cache() -> Path:
    """The folder for compiled programs, calibrated adapters and successor tables where none is named."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "atlas-jax"
