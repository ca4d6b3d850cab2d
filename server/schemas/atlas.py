"""The `atlas` object of a request and its defaults, and the bodies of the `/v1/atlas/*` endpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from atlas_jax.engine.api import HistoryEffect, StateBytes
from atlas_jax.engine.config import MemoryDim
from atlas_jax.engine.memory_options import MemoryOptions
from server.schemas.derive import fields_of, nullable, struct_of

SessionId = Annotated[str, Meta(min_length=1, max_length=128, description="Name of a session, per API key")]
FileName = Annotated[str, Meta(max_length=128, description="Name of a file in the server's memory folder")]


class AtlasDefaults(MemoryOptions, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a request gets for the fields of its `atlas` object that it leaves out."""

    enabled: Annotated[bool, Meta(description="Whether an atlas object or a session turns the memory on")] = True
    batch_size: Annotated[int, Meta(ge=1, le=32, description="Sequences of one request that decode at once")] = 8


class _SessionFields(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The fields of a request's `atlas` object that have no default on the server."""

    session_id: (
        Annotated[
            SessionId, Meta(description="Name of a session, per API key; without one the memory ends with the request")
        ]
        | None
    ) = None
    memory_dim: (
        Annotated[MemoryDim, Meta(description="Dimension of the memory's keys, decided when the server starts")] | None
    ) = None
    regenerate: Annotated[
        bool | None,
        Meta(
            description="true: a prompt the session has answered before is answered anew, and what followed is forgotten"
        ),
    ] = None
    token_gates: Annotated[
        bool | None,
        Meta(
            description="true: every choice says for each token of its answer what weight the memory had (chats, completions)"
        ),
    ] = None


if TYPE_CHECKING:

    class AtlasOptions(_SessionFields, kw_only=True, frozen=True):
        """As below, of which a type checker knows the fields that are read by name."""

else:
    AtlasOptions = struct_of(
        "AtlasOptions",
        [*fields_of(_SessionFields), *nullable(fields_of(AtlasDefaults))],
        module=__name__,
        doc="How one request uses the memory; null and absent mean the server's default.",
    )


class TokenGate(Struct, kw_only=True, frozen=True):
    """A token of an answer and the weight g of the memory's distribution in (1 - g) p_model + g p_memory, where it was drawn.

    Tokens are in order, and those of a stream's chunk are those whose text it completes; control tokens are left out.
    """

    token: str
    bytes: Annotated[list[int], Meta(description="Its own bytes: a token may be part of a character")]
    gate: Annotated[float, Meta(ge=0, le=1)]


_KEPT = "Keys and values kept of what has left the window, per KV head and on average per layer"


class StateFields(Struct, kw_only=True, frozen=True):
    """The bytes of a session's state, or of all sessions of a total, part by part."""

    memory_budget_bytes: Annotated[
        int,
        Meta(description="What the state had to fit into when the session began; 0 for a model with its own memory"),
    ]
    state_bytes: Annotated[int, Meta(description="The whole state when each of its parts is full")]
    window_bytes: Annotated[int, Meta(description="Of that, the exact window")]
    kept_bytes: Annotated[int, Meta(description="Of that, the kept pairs, and what they are chosen by")]
    memory_bytes: Annotated[int, Meta(description="Of that, the recall memory, or a model's own")]


def state_fields(state: StateBytes) -> dict[str, int]:
    """The fields of `StateFields`."""
    return {
        "memory_budget_bytes": state.budget,
        "state_bytes": state.total,
        "window_bytes": state.window,
        "kept_bytes": state.kept,
        "memory_bytes": state.memory,
    }


class AtlasStats(StateFields, kw_only=True, frozen=True):
    """What the memory did in one request, measured in it."""

    memory_utilization: float
    window_fill_ratio: float
    kept_pairs: Annotated[int, Meta(description=_KEPT)]
    kept_pairs_capacity: Annotated[int, Meta(description="The most that are kept")]
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


class ForkRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/atlas/memory/fork`: a session, and the name of the one that begins where it is."""

    session_id: SessionId
    target: SessionId


class RenameRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/atlas/memory/rename`: a session, and the name it gets."""

    session_id: SessionId
    target: SessionId


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


class ContextRow(StateFields, kw_only=True, frozen=True):
    """One stored or resident session."""

    context_id: str
    tokens: int
    bytes: Annotated[
        int, Meta(description="Of main memory: what is in use of its state, and of those of its last turns")
    ]
    window_size: int
    window_fill: int
    kept_pairs: Annotated[int, Meta(description=_KEPT)]
    kept_pairs_capacity: Annotated[int, Meta(description="The most that are kept")]
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


class ForkResponse(Struct, kw_only=True, frozen=True):
    """Answer to a fork."""

    success: bool
    session_id: str
    target: str


class RenameResponse(Struct, kw_only=True, frozen=True):
    """Answer to a rename."""

    success: bool
    session_id: str
    target: str


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


class MemoryResponse(StateFields, kw_only=True, frozen=True):
    """State of one session's memory, or totals over the caller's sessions."""

    session_id: str | None
    window_size: int
    window_fill: int
    kept_pairs: Annotated[int, Meta(description=_KEPT)]
    kept_pairs_capacity: Annotated[int, Meta(description="The most that are kept")]
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


class FittingProgress(Struct, kw_only=True, frozen=True):
    """How far the fitting of a memory to the model is."""

    stage: str
    progress: Annotated[float, Meta(description="Share of the stage that is done")]
    seconds: Annotated[float, Meta(description="Since it began")]


class StatusData(StateFields, kw_only=True, frozen=True):
    """The memory subsystem at a glance; the bytes are those of a session that is begun with the engine's own defaults."""

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
    kept_pairs_capacity: Annotated[int, Meta(description="The most kept pairs a request may ask for")]
    state_bytes_per_session: Annotated[int, Meta(description="The same as state_bytes")]
    adapter: str | None
    set_aside: list[SetAside]
    memory_unavailable: str | None
    fitting: Annotated[
        FittingProgress | None, Meta(description="How far the memory is that the model does not have yet, but will")
    ]


class StatusResponse(Struct, kw_only=True, frozen=True):
    """Answer of `GET /v1/atlas/status`."""

    status: Literal["healthy", "unhealthy", "draining"]
    data: StatusData


class StatsResponse(Struct, kw_only=True, frozen=True):
    """Answer of `GET /v1/atlas/stats`; the averages are exponential (0.9/0.1)."""

    requests_processed: int
    avg_memory_utilization: float
    avg_window_fill_ratio: float
    avg_kept_fill_ratio: float
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
    kept_fill_ratio: float
    contexts_in_use: int
