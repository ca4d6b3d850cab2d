"""The `atlas` object of a request, its run-time defaults, and the bodies of the `/v1/atlas/*` endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from atlas_jax.config import MAX_MEMORY_DIM, MEMORY_DIM_STEP, MIN_MEMORY_DIM

CacheStrategy = Literal["lru", "lfu", "adaptive"]
HistoryEffect = Literal["new", "continued", "appended", "rolled_back"]
MemoryLayers = Annotated[
    int, Meta(ge=1, le=10, description="Transformer layers that carry a memory, best-ranked first")
]
# The lower bound is checked together with the server's own upper bound, so that one message names both.
WindowSize = Annotated[
    int,
    Meta(
        description="Tokens attended exactly: a multiple of the page, from 128 to the server's maximum",
        extra_json_schema={"minimum": 128},
    ),
]
BlendRatio = Annotated[float, Meta(ge=0, le=1, description="0 window only, 0.5 as fitted, 1 memory alone")]
# A step twice as long as the line search's no longer lowers the objective; a longer one raises it.
LearningRate = Annotated[
    float, Meta(gt=0, lt=0.002, description="Inner step size; 0.001, like null, is the calibrated one")
]
PolynomialDegree = Annotated[int, Meta(ge=1, le=3, description="Degree of the feature map")]
MemoryDim = Annotated[
    int,
    Meta(
        ge=MIN_MEMORY_DIM,
        le=MAX_MEMORY_DIM,
        multiple_of=MEMORY_DIM_STEP,
        description="Numbers of a state that the memory's keys keep; decided when the server starts",
    ),
]
WarmupTokens = Annotated[int, Meta(ge=0, le=1 << 31, description="Tokens written to the memory before it is read")]
UpdateFrequency = Annotated[int, Meta(ge=1, le=512, description="Tokens per memory write: a multiple of the page")]
OmegaWindow = Annotated[
    int, Meta(ge=1, le=512, description="Tokens in the objective of one write, at least update_frequency")
]
BatchSize = Annotated[int, Meta(ge=1, le=32, description="Sequences of one request that decode at once")]
SessionId = Annotated[str, Meta(min_length=1, max_length=128, description="Name of a session, per API key")]
FileName = Annotated[str, Meta(max_length=128, description="Name of a file in the server's memory folder")]


class AtlasOptions(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How one request uses the memory; null and absent mean the server's default."""

    enabled: bool | None = None
    session_id: SessionId | None = None
    memory_layers: MemoryLayers | None = None
    window_size: WindowSize | None = None
    blend_ratio: BlendRatio | None = None
    learning_rate: LearningRate | None = None
    polynomial_degree: PolynomialDegree | None = None
    memory_dim: MemoryDim | None = None
    use_muon: bool | None = None
    warmup_tokens: WarmupTokens | None = None
    update_frequency: UpdateFrequency | None = None
    omega_window: OmegaWindow | None = None
    cache_strategy: CacheStrategy | None = None
    batch_size: BatchSize | None = None
    read: bool | None = None
    write: bool | None = None
    regenerate: Annotated[
        bool | None,
        Meta(
            description="true: a prompt the session has answered before is answered anew, and what followed is forgotten"
        ),
    ] = None


class AtlasDefaults(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a request gets for the fields of its `atlas` object that it leaves out."""

    enabled: Annotated[bool, Meta(description="Whether an atlas object or a session turns the memory on")] = True
    memory_layers: MemoryLayers = 1
    window_size: WindowSize = 512
    blend_ratio: BlendRatio = 0.5
    learning_rate: LearningRate | None = None
    polynomial_degree: PolynomialDegree = 2
    use_muon: Annotated[
        bool | None, Meta(description="true Muon, false plain gradient (OmegaNet), null the exact minimum-norm solve")
    ] = None
    warmup_tokens: WarmupTokens = 0
    update_frequency: UpdateFrequency = 128
    omega_window: OmegaWindow = 512
    cache_strategy: Annotated[
        CacheStrategy, Meta(description="Which sessions leave the device and host tiers first (adaptive = ARC)")
    ] = "adaptive"
    batch_size: BatchSize = 8
    read: Annotated[bool, Meta(description="Whether the memory takes part in the answer")] = True
    write: Annotated[bool, Meta(description="Whether the request teaches the session")] = True


class AtlasStats(Struct, kw_only=True, frozen=True):
    """What the memory did in one request, measured in it."""

    memory_utilization: float
    window_fill_ratio: float
    omega_loss: float
    muon_iterations: int
    blend_ratio_actual: float
    tokens_absorbed: int
    session_id: str | None
    cache_hit: bool
    history: Annotated[
        HistoryEffect,
        Meta(
            description="What the prompt did to the session: new began it, continued repeated its end and went on, appended "
            "was new text after all it holds, rolled_back replaced what followed an edit or a turn asked again"
        ),
    ]
    tokens_reused: Annotated[
        int, Meta(description="Tokens of the prompt that the session held already and that were not read again")
    ]
    writes_skipped: int
    degraded: str | None


# --- run-time configuration ---------------------------------------------------------------------------------------
IntervalSeconds = Annotated[float, Meta(ge=1, le=86_400)]
IntervalMs = Annotated[int, Meta(ge=50, le=3_600_000)]
BudgetMs = Annotated[float, Meta(gt=0, le=60_000)]


class ConfigChange(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/atlas/config`: the settings to change, all or none of them.

    null resets `learning_rate` and `use_muon` to the calibrated choice and leaves every other field as it is.
    `memory_dim` is decided when the server starts: another than the one that is shown is refused.
    """

    enabled: bool | None = None
    memory_layers: MemoryLayers | None = None
    window_size: WindowSize | None = None
    blend_ratio: BlendRatio | None = None
    learning_rate: LearningRate | UnsetType | None = UNSET
    polynomial_degree: PolynomialDegree | None = None
    use_muon: bool | UnsetType | None = UNSET
    warmup_tokens: WarmupTokens | None = None
    update_frequency: UpdateFrequency | None = None
    omega_window: OmegaWindow | None = None
    cache_strategy: CacheStrategy | None = None
    batch_size: BatchSize | None = None
    read: bool | None = None
    write: bool | None = None
    memory_save_interval: IntervalSeconds | None = None
    metrics_interval: IntervalMs | None = None
    stats_update_interval: IntervalMs | None = None
    latency_budget_ms: BudgetMs | None = None
    log_atlas_operations: bool | None = None
    memory_dim: MemoryDim | None = None


class RuntimeValues(AtlasDefaults, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Everything `/v1/atlas/config` shows and changes: the defaults of the `atlas` object, and the intervals."""

    memory_save_interval: IntervalSeconds
    metrics_interval: IntervalMs
    stats_update_interval: IntervalMs
    latency_budget_ms: BudgetMs
    log_atlas_operations: bool
    memory_dim: MemoryDim | None = None


class ConfigResponse(Struct, kw_only=True, frozen=True):
    """Answer of `GET` and `POST /v1/atlas/config`."""

    status: str
    data: RuntimeValues


# --- memory -------------------------------------------------------------------------------------------------------
class SaveRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/atlas/memory/save`: nothing, a file name, a session, or a context with the caller's state."""

    filename: FileName | None = None
    session_id: SessionId | None = None
    context_id: SessionId | None = None
    state: Any = UNSET


class LoadRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/atlas/memory/load`: a file name or a context."""

    filename: FileName | None = None
    context_id: SessionId | None = None


class ListRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/atlas/memory/list`: how many contexts, and the cursor of the page before."""

    limit: Annotated[int, Meta(ge=1, le=1000)] | None = None
    after: Annotated[str, Meta(max_length=512)] | None = None


class DeleteRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/atlas/memory/delete`: a context, or a file of sessions."""

    context_id: SessionId | None = None
    filename: FileName | None = None


class ResetRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/atlas/memory/reset`: one session, or, said in so many words, all of the caller's."""

    session_id: SessionId | None = None
    all: Annotated[bool, Meta(description="true resets every session of the caller")] | None = None


class SaveResponse(Struct, kw_only=True, frozen=True):
    """What a save wrote; `context_id` is null when it was not a single session."""

    success: bool
    filename: str
    context_id: str | None
    bytes: int
    timestamp: int


class LoadResponse(Struct, kw_only=True, frozen=True):
    """Answer to a load: `filename` for a file; `context_id` and `state` for a context."""

    success: bool
    loaded_at: int
    filename: str | UnsetType = UNSET
    context_id: str | UnsetType = UNSET
    state: Any = UNSET


class ContextRow(Struct, kw_only=True, frozen=True):
    """One stored or resident session."""

    context_id: str
    tokens: int
    bytes: int
    created: float
    last_used: float
    resident: Literal["device", "host", "disk"]
    has_state: bool


class FileRow(Struct, kw_only=True, frozen=True):
    """One file of the caller's sessions, as `filename` in a save made it."""

    filename: str
    bytes: int
    modified: int


class ListResponse(Struct, kw_only=True, frozen=True):
    """One page of contexts; `next` is the `after` of the following page, null on the last."""

    success: bool
    contexts: list[ContextRow]
    next: str | None
    files: list[FileRow]


class DeleteResponse(Struct, kw_only=True, frozen=True):
    """Answer to a delete."""

    success: bool
    context_id: str | UnsetType = UNSET
    filename: str | UnsetType = UNSET


class ResetResponse(Struct, kw_only=True, frozen=True):
    """Answer to a reset: how many sessions were emptied."""

    success: bool
    session_id: str | None
    sessions_reset: int
    timestamp: int


class LayerMemory(Struct, kw_only=True, frozen=True):
    """One matrix of the memory; `taps` are the layers whose states its keys are made of, `layer` the best of them."""

    layer: int
    taps: list[int]
    norm: float
    effective_rank: float
    omega_loss: float


class MemoryResponse(Struct, kw_only=True, frozen=True):
    """State of one session's memory, or totals over the caller's sessions."""

    session_id: str | None
    window_size: int
    window_fill: int
    memory_capacity: int
    memory_used: int
    total_updates: int
    last_update_time: float | None
    layers: list[LayerMemory]


# --- status, statistics, metrics ----------------------------------------------------------------------------------
class SetAside(Struct, kw_only=True, frozen=True):
    """One of the caller's sessions or files that cannot be used, and why; it is kept as it is."""

    name: str
    kind: Literal["session", "file"]
    reason: str


class StatusData(Struct, kw_only=True, frozen=True):
    """The memory subsystem at a glance."""

    initialized: bool
    enabled: bool
    context_pool_size: int
    contexts_in_use: int
    metrics_enabled: bool
    memory_persistence: bool
    uptime_seconds: float
    model: str
    memory_layers: list[int]
    memory_dim: int | None
    state_bytes_per_session: int
    adapter: str | None
    set_aside: list[SetAside]
    memory_unavailable: str | None


class StatusResponse(Struct, kw_only=True, frozen=True):
    """Answer of `GET /v1/atlas/status`."""

    status: Literal["healthy", "unhealthy", "draining"]
    data: StatusData


class StatsResponse(Struct, kw_only=True, frozen=True):
    """Answer of `GET /v1/atlas/stats`; the averages are exponential (0.9/0.1)."""

    requests_processed: int
    avg_memory_utilization: float
    avg_window_fill_ratio: float
    total_muon_iterations: int
    total_omega_loss: float
    uptime_seconds: float
    memory_saves: int
    memory_loads: int


class CurrentMetrics(Struct, kw_only=True, frozen=True):
    """The server's figures of this moment; latency is what the server adds on top of the engine."""

    total_requests: int
    active_requests: int
    completed_requests: int
    failed_requests: int
    avg_latency_ms: float
    max_latency_ms: float
    min_latency_ms: float
    memory_usage_bytes: int
    cache_hits: int
    cache_misses: int
    throughput_tokens_per_sec: float
    uptime_seconds: float


class MetricsData(Struct, kw_only=True, frozen=True):
    """`history_size` is how many of the latest requests the latency figures cover."""

    current: CurrentMetrics
    history_size: int
    server_health: bool


class MetricsResponse(Struct, kw_only=True, frozen=True):
    """Answer of `GET /v1/atlas/metrics`."""

    status: str
    data: MetricsData


class MetricsEvent(Struct, kw_only=True, frozen=True):
    """One event of `GET /v1/atlas/metrics/stream`."""

    timestamp: int
    active_requests: int
    avg_latency: float
    requests_waiting: int
    completed_requests: int
    failed_requests: int
    throughput_tokens_per_sec: float
    memory_utilization: float
    window_fill_ratio: float
    contexts_in_use: int
