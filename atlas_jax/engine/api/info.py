"""What a server can ask of an engine: the model, the sessions, counters and decode slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from atlas_jax.engine.api.requests import Pooling


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes of a session's state when each of its parts is full, or totals over sessions.

    Attributes:
      window: of the exact window.
      kept: of the kept pairs, and of what they are chosen by.
      memory: of the recall memory; all of the state where a model has a memory of its own.
      budget: what they had to fit into when the session began; 0 where a model has a memory of its own.
    """

    window: int = 0
    kept: int = 0
    memory: int = 0
    budget: int = 0

    @property
    def total(self) -> int:
        """The whole state."""
        return self.window + self.kept + self.memory

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            window=self.window + other.window,
            kept=self.kept + other.kept,
            memory=self.memory + other.memory,
            budget=self.budget + other.budget,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraInfo:
    """A LoRA adapter that is loaded.

    Attributes:
      name: of its file.
      digest: SHA-256 of its file.
      scale: how far requests use it that say nothing of adapters.
      task_name, prompt_prefix: what the file says of itself.
    """

    name: str
    digest: str
    scale: float
    task_name: str = ""
    prompt_prefix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """The model being served.

    Attributes:
      name: file name without `.gguf`; the id clients use.
      fingerprint: identifies weights and tokenizer; snapshots are bound to it.
      context_length: the model's trained context in tokens.
      created: Unix seconds (the file's time).
      memory_dim: numbers of a hidden state that the recall memory's keys keep; None without such a memory.
      state: of a session that is begun with the engine's own defaults; its budget is the most a request may ask for.
      kept_pairs_capacity: the most pairs a request may keep, per KV head and on average per layer.
      memory_unavailable: why the model is served without a memory although one was asked for, or None.
      infill: tokens that go before a text with a gap, before what follows the gap, and before what fills it; None where the
        vocabulary has none.
      pooling: of embeddings that name none; None where the file asks for one there is not.
      sampling: what the file recommends, by the names of `SamplingParams`; empty where it says nothing.
      lora: LoRA adapters beside it, with the scales they began with.
    """

    name: str
    architecture: str
    fingerprint: str
    parameters: int
    size_bytes: int
    context_length: int
    vocab_size: int
    layers: int
    embedding_size: int
    memory_layers: tuple[int, ...]
    state: StateBytes
    adapter: str | None
    created: int
    memory_dim: int | None = None
    kept_pairs_capacity: int = 0
    memory_unavailable: str | None = None
    infill: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    pooling: Pooling | None = "mean"
    sampling: Mapping[str, float] = field(default_factory=dict)
    lora: tuple[LoraInfo, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """How far the fitting of a memory to the model is.

    Attributes:
      stage: what is being done.
      share: of the stage that is done, 0 to 1.
      seconds: since it began.
    """

    stage: str
    share: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateFacts:
    """What the model's chat template does beside writing messages, found out by having it render some.

    Attributes:
      call: how it writes an assistant's call of a tool with an argument; empty unless it also tells the model of tools and
        gives it their results.
      system: whether it takes a system message.
      thinking: the marks around what the model thinks before its answer, or None.
      channels: whether answers are messages in channels, as gpt-oss has them (OpenAI's Harmony).
    """

    call: str = ""
    system: bool = True
    thinking: tuple[str, str] | None = None
    channels: bool = False

    @property
    def thinks(self) -> bool:
        """Whether what the model thinks is told from its answer."""
        return self.thinking is not None or self.channels


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMemoryInfo:
    """One matrix of one session's memory (or means over the sessions asked for).

    Attributes:
      layer: the transformer layer it belongs to, the best-ranked of its taps.
      taps: every layer whose state its keys are made of.
    """

    layer: int
    taps: tuple[int, ...]
    norm: float
    effective_rank: float
    omega_loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryInfo:
    """State of one session's memory, or totals over an owner's sessions.

    Attributes:
      window_size, window_fill: tokens of the exact window, and how many of it are held; never more.
      kept_pairs, kept_pairs_capacity: pairs kept of what has left the window, per KV head and on average per layer, and how
        many may be.
      memory_capacity, memory_used: independent pairs the memory can hold, and how many directions are in use.
      last_update_time: Unix seconds, or None before the first write.
    """

    window_size: int
    window_fill: int
    kept_pairs: int
    kept_pairs_capacity: int
    memory_capacity: int
    memory_used: int
    total_updates: int
    last_update_time: float | None
    state: StateBytes
    layers: tuple[LayerMemoryInfo, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """One row of a session listing.

    Attributes:
      bytes: that it takes of main memory; its last turns' states are in it, and only as much of each as is in use.
      window_size, window_fill, kept_pairs, kept_pairs_capacity, state: as in `MemoryInfo`.
    """

    session_id: str
    tokens: int
    bytes: int
    window_size: int
    window_fill: int
    kept_pairs: int
    kept_pairs_capacity: int
    state: StateBytes
    created: float
    last_used: float
    resident: Literal["device", "host", "disk"]
    has_state: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """A stored session or file that cannot be used; it is kept as it is.

    Attributes:
      name: of the session or file; where damage has made a session's name unreadable, a digest of it.
    """

    name: str
    kind: Literal["session", "file"]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One row of a listing of exports; `modified` in Unix seconds."""

    filename: str
    bytes: int
    modified: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveResult:
    """What a save wrote."""

    filename: str
    session_id: str | None
    bytes: int
    sessions: int
    timestamp: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counters since start, and gauges of this moment.

    Attributes:
      omega_loss_total: of every write that was taken.
      omega_loss, memory_utilization, window_fill_ratio, kept_pairs, kept_pairs_capacity, state: of the request with a
        memory that ended last.
    """

    requests_total: int
    requests_running: int
    requests_waiting: int
    requests_completed: int
    requests_failed: int
    requests_cancelled: int
    prompt_tokens_total: int
    cached_tokens_total: int
    generated_tokens_total: int
    drafted_tokens_total: int
    accepted_tokens_total: int
    tokens_per_second: float
    steps_total: int
    step_seconds_total: float
    compilations_total: int
    sessions_device: int
    sessions_host: int
    sessions_disk: int
    session_hits: int
    session_misses: int
    memory_updates_total: int
    muon_iterations_total: int
    writes_skipped_total: int
    omega_loss_total: float
    omega_loss: float
    memory_utilization: float
    window_fill_ratio: float
    kept_pairs: int
    kept_pairs_capacity: int
    state: StateBytes
    memory_saves: int
    memory_loads: int
    snapshot_failures: int
    session_conflicts: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotInfo:
    """One decode slot, as `GET /slots` shows it (no text); `owner` is whose request it runs, None in a free one."""

    id: int
    busy: bool
    owner: str | None
    prompt_tokens: int
    generated_tokens: int
    session: bool
