"""Every setting of the server: its default, its range, and what it does.

The structs mirror the JSON configuration file; `server.config.sources` gives each field its flag and environment variable.
What the engine is opened with takes type, range, default and help text from `atlas_jax.engine.config`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from atlas_jax.engine import config as engine
from atlas_jax.engine.config import EngineConfig
from server.schemas.atlas import AtlasDefaults
from server.schemas.sampling import Fraction, Penalty, RepeatPenalty, Temperature, TopK

Port = Annotated[int, Meta(ge=0, le=65_535)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
LogLevel = Literal["trace", "debug", "info", "warning", "error"]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
IntervalSeconds = Annotated[float, Meta(ge=1, le=86_400)]
IntervalMs = Annotated[int, Meta(ge=50, le=3_600_000)]


class SettingsError(Exception):
    """A setting that is unknown or out of range; the message names it and where it came from."""


class ServerSection(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The `server` section: the network, the limits, the model."""

    host: Annotated[str, Meta(description="Address to listen on")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Port to listen on; 0 takes a free one")] = 8080
    threads: engine.Threads = EngineConfig.threads
    native_kernels: engine.NativeKernels = EngineConfig.native_kernels
    gpu_kernels: engine.GpuKernels = EngineConfig.gpu_kernels
    prefix_cache_size: engine.PrefixCacheSize = EngineConfig.prefix_cache_size
    speculate: engine.Speculate = EngineConfig.speculate
    pooling: engine.PoolingName | None = EngineConfig.pooling
    mesh_data: engine.MeshData = EngineConfig.mesh_data
    mesh_model: engine.MeshModel = EngineConfig.mesh_model
    distributed: engine.Distributed = EngineConfig.distributed
    coordinator_address: engine.CoordinatorAddress | None = EngineConfig.coordinator_address
    num_processes: engine.NumProcesses | None = EngineConfig.num_processes
    process_id: engine.ProcessId | None = EngineConfig.process_id
    weight_dtype: engine.WeightDtypeName = EngineConfig.weight_dtype
    kv_dtype: engine.KVDtypeName = EngineConfig.kv_dtype
    cache_path: Annotated[
        str | None,
        Meta(
            description="Folder of compiled programs, fitted adapters and bigram tables; null is $XDG_CACHE_HOME/atlas-jax"
        ),
    ] = None
    model: Annotated[str | None, Meta(description="GGUF file, or folder of safetensors, to serve")] = None
    hf_repo: engine.HfRepo | None = EngineConfig.hf_repo
    offline: engine.Offline = EngineConfig.offline
    lora: engine.Lora = EngineConfig.lora
    model_alias: Annotated[tuple[str, ...], Meta(description="More names of the model in requests")] = ()
    strict_model: Annotated[
        bool, Meta(description="Refuse requests that name another model instead of answering with this one")
    ] = False
    api_keys_file: Annotated[str | None, Meta(description="File of API keys, one a line: key[:owner][:admin]")] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(description="Host names requests may be addressed to, beside this machine's and private ones; '*' is any"),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...], Meta(description="Web origins whose pages may call the API; '*' allows any")
    ] = ()
    trusted_proxies: Annotated[
        tuple[str, ...], Meta(description="Addresses whose X-Forwarded-For and X-Forwarded-Proto are believed")
    ] = ()
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30, description="Largest request body")] = 4 << 20
    max_connections: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | None,
        Meta(description="Open connections; null is 4096, or what the limit on open files leaves"),
    ] = None
    max_concurrent: engine.MaxConcurrent = EngineConfig.max_concurrent
    reserved_concurrent: Annotated[
        Count | None,
        Meta(description="Places kept for keys that hold none; null is a quarter where there may be several, else 0"),
    ] = None
    max_waiting: engine.MaxWaiting = EngineConfig.max_waiting
    max_waiting_per_key: Annotated[
        Count | None,
        Meta(description="Requests one key may have waiting; null is half where there may be several, else all"),
    ] = None
    queue_timeout: Annotated[Seconds, Meta(description="Seconds a request waits for a place at most")] = 60.0
    rate_limit_requests: Annotated[Count, Meta(description="Requests a minute and key; 0 is no limit")] = 0
    rate_limit_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 40)], Meta(description="Tokens a minute and key; 0 is no limit")
    ] = 0
    failure_limit: Annotated[
        Count, Meta(description="Requests without a valid key a minute and address; 0 is no limit")
    ] = 60
    max_context: engine.MaxContext = EngineConfig.max_context
    max_answer_tokens: Annotated[
        int, Meta(ge=1, le=1 << 31, description="Longest answer; a request that asks for more gets this much")
    ] = 32_768
    header_timeout: Annotated[Seconds, Meta(description="Seconds a request's head may take to come")] = 20.0
    client_timeout: Annotated[
        Seconds, Meta(description="Seconds a client may stall in its body or not read before it is dropped")
    ] = 30.0
    ping_interval: Annotated[Seconds, Meta(description="Seconds of silence before a stream sends a comment")] = 15.0
    shutdown_grace: Annotated[
        int,
        Meta(
            ge=1,
            le=3600,
            description="Seconds running requests get to finish when the server is told to stop; saving takes up to 5 more",
        ),
    ] = 4
    log_level: Annotated[
        LogLevel,
        Meta(description="How much is logged: trace, debug, info, warning or error; trace has the libraries' too"),
    ] = "info"


class SamplingSection(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The `sampling` section: what requests get that leave a field out.

    null is what the model's file recommends, and where it recommends nothing the project's own default
    (`server.services.sampling`).
    """

    temperature: Annotated[Temperature | None, Meta(description="Temperature; 0 is greedy")] = None
    top_k: Annotated[TopK | None, Meta(description="Keep the k likeliest tokens; 0 keeps every one")] = None
    top_p: Annotated[
        Fraction | None, Meta(description="Nucleus sampling: keep the likeliest tokens of this probability in all")
    ] = None
    min_p: Annotated[
        Fraction | None, Meta(description="Keep tokens of at least this share of the likeliest token's probability")
    ] = None
    typical_p: Annotated[
        Fraction | None, Meta(description="Keep the most typical tokens of this probability in all")
    ] = None
    repeat_penalty: Annotated[
        RepeatPenalty | None, Meta(description="Divides the logits of tokens in the prompt or answer; 1 is off")
    ] = None
    presence_penalty: Annotated[
        Penalty | None, Meta(description="Subtracted from the logits of tokens already generated")
    ] = None
    frequency_penalty: Annotated[
        Penalty | None, Meta(description="Subtracted from a token's logit once for each time it was generated")
    ] = None


class AtlasSection(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The `atlas` section: the memory and what is kept of it."""

    enabled: Annotated[bool, Meta(description="Whether the server offers the memory at all")] = True
    adapter: Annotated[str | None, Meta(description="Adapter file fitted to the model")] = None
    memory_path: Annotated[
        str, Meta(description="Folder of the stored sessions; with session_store, of copies of them")
    ] = "./atlas_memory"
    session_store: engine.SessionStore | None = EngineConfig.session_store
    session_store_endpoint: engine.SessionStoreEndpoint | None = EngineConfig.session_store_endpoint
    memory_file: engine.FileName | None = EngineConfig.memory_file
    memory_persist: Annotated[bool, Meta(description="Whether anything is ever written to or read from disk")] = True
    auto_load_memory: Annotated[bool, Meta(description="Load the memory file at start")] = True
    auto_save_memory: Annotated[bool, Meta(description="Save the memory at every interval and at the end")] = True
    memory_save_interval: Annotated[IntervalSeconds, Meta(description="Seconds between two automatic saves")] = 300.0
    enable_memory_endpoints: Annotated[bool, Meta(description="Offer /v1/atlas/memory/*")] = True
    enable_metrics: Annotated[
        bool, Meta(description="Offer /metrics, /v1/atlas/metrics and /v1/atlas/metrics/stream")
    ] = True
    enable_realtime_stats: Annotated[bool, Meta(description="Offer /v1/atlas/metrics/stream")] = True
    stats_update_interval: Annotated[
        IntervalMs, Meta(description="Milliseconds between two samples of the averages of /v1/atlas/stats")
    ] = 1000
    metrics_interval: Annotated[
        IntervalMs, Meta(description="Milliseconds between two events of /v1/atlas/metrics/stream")
    ] = 1000
    metrics_history_size: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Latest requests the latency figures cover")
    ] = 1000
    latency_budget_ms: Annotated[
        float,
        Meta(
            gt=0, le=60_000, description="What the server may add to a request before it is counted and logged as slow"
        ),
    ] = 5.0
    log_atlas_operations: Annotated[
        bool,
        Meta(description="Log every request that used the memory, and every save, load, reset and deletion asked for"),
    ] = False
    context_pool_size: Annotated[
        Annotated[int, Meta(ge=1, le=8192)] | None,
        Meta(description="Memory contexts, one a sequence, that may be in use at once; null is max_concurrent"),
    ] = None
    max_window: engine.MaxWindow = EngineConfig.max_window
    memory_dim: engine.MemoryDim | None = EngineConfig.memory_dim
    calibration_seconds: engine.CalibrationSeconds = EngineConfig.calibration_seconds
    calibrate_in_background: engine.CalibrateInBackground = True
    memory_budget: engine.MemoryBudget | None = EngineConfig.memory_budget
    l1_cache_size: engine.L1CacheSize = EngineConfig.l1_cache_size
    l2_cache_size: engine.L2CacheSize = EngineConfig.l2_cache_size
    l3_cache_size: engine.L3CacheSize = EngineConfig.l3_cache_size
    owner_quota: Annotated[
        Bytes | None,
        Meta(
            description="Bytes one API key's sessions and files may take on disk; null is half of l3_cache_size, or all"
            " of it without keys"
        ),
    ] = None
    session_ttl: Annotated[
        float,
        Meta(
            ge=0,
            le=1e9,
            description="Seconds after which an unused session or chain of responses is deleted; 0 keeps all",
        ),
    ] = 0.0
    journal_sync: engine.JournalSync | None = EngineConfig.journal_sync
    default_config: AtlasDefaults = field(default_factory=AtlasDefaults)


class Settings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The whole configuration."""

    server: ServerSection = field(default_factory=ServerSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    atlas: AtlasSection = field(default_factory=AtlasSection)

    def public(self) -> dict[str, Any]:
        """The settings as JSON values, with secrets hidden."""
        out: dict[str, Any] = msgspec.to_builtins(self)
        if self.server.api_keys_file is not None:
            out["server"]["api_keys_file"] = "***"
        return out
