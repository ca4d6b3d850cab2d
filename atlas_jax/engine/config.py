"""Every setting of an engine: one name from the command line to the runner, its range, its default and what it does.

The server's settings take type, range, help text and default from here. No JAX, so that a program can say what it would
open without waiting for it.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from atlas_jax.config import MAX_MEMORY_DIM, MEMORY_DIM_STEP, MIN_MEMORY_DIM, PAGE, ConfigError, KVDtype, WeightDtype
from atlas_jax.hub import HubError, Repository, find_model

MIN_WINDOW = PAGE
HfRepo = Annotated[
    str,
    Meta(
        description="Repository to fetch the model from: org/name, or org/name:Q8_0 for another quantisation than Q4_K_M"
    ),
]
Offline = Annotated[bool, Meta(description="Take a repository's model from the cache and ask nobody")]
Lora = Annotated[
    tuple[str, ...],
    Meta(description="LoRA adapters beside the model: GGUF files, or FILE=SCALE for another scale than 1"),
]
LORA_SCALE = 1000.0
"""The largest scale of a LoRA adapter, of either sign."""
_Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]

FileName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="File in memory_path the sessions are saved to and loaded from; null is <model>_memory.atlas",
    ),
]
JournalSync = Annotated[
    float,
    Meta(
        ge=0,
        le=60,
        description="Seconds the disk, or the object store, may be behind what was answered; 0 waits for it each time; null "
        "is 1 for a disk and 0 for an object store",
    ),
]
SessionStore = Annotated[
    str,
    Meta(
        pattern=r"^((s3|gs|az)://[^/].*)?$",
        description="Object store of the sessions, which any number of servers use at once: s3://bucket/prefix, gs:// or "
        "az://; credentials as the cloud's own environment variables say; null is the folder memory_path",
    ),
]
SessionStoreEndpoint = Annotated[
    str,
    Meta(
        pattern=r"^(https?://.+)?$",
        description="URL of a server that is compatible with S3 or Azure; null is the cloud's, or what the environment says",
    ),
]
Threads = Annotated[int, Meta(ge=0, le=1_000_000, description="CPU threads of the engine; 0 takes every core")]
MaxConcurrent = Annotated[int, Meta(ge=1, le=4096, description="Requests, or sequences of one, that run at once")]
MaxWaiting = Annotated[int, Meta(ge=0, le=1_000_000, description="Requests that may wait for a place")]
MaxContext = Annotated[
    int,
    Meta(
        ge=PAGE,
        le=(1 << 30) - 1,
        description="Longest request without memory in tokens; the model's own context if that is shorter",
    ),
]
MaxWindow = Annotated[
    int,
    Meta(ge=MIN_WINDOW, le=1 << 20, multiple_of=PAGE, description="Largest window_size a request may ask for"),
]
MemoryDim = Annotated[
    int,
    Meta(
        ge=MIN_MEMORY_DIM,
        le=MAX_MEMORY_DIM,
        multiple_of=MEMORY_DIM_STEP,
        description="Dimension of the memory's keys; null is the adapter's, 96 for one that is shipped or fitted here",
    ),
]
MemoryBudget = Annotated[
    int,
    Meta(
        ge=0,
        le=1 << 40,
        description="Bytes of one session's state: beside the exact window and the memory, keys and values are kept of what "
        "has left the window, as many as fit; null is what suits the model, 16 MiB for a small one",
    ),
]
L1CacheSize = Annotated[
    _Bytes, Meta(description="Session cache on the device in bytes; 0 keeps idle sessions in host memory")
]
L2CacheSize = Annotated[_Bytes, Meta(description="Session cache in host memory in bytes")]
L3CacheSize = Annotated[
    _Bytes, Meta(description="Session storage on disk in bytes; with session_store, copies of what lies there")
]
OwnerQuota = Annotated[_Bytes, Meta(description="Bytes one API key's sessions and files may take on disk")]
PrefixCacheSize = Annotated[
    _Bytes,
    Meta(description="Prefix-cache size in bytes: the KV cache of prompts, for prompts that begin the same; 0 is off"),
]
WeightDtypeName = Annotated[WeightDtype, Meta(description="Type of the weights: int8 or float32")]
KVDtypeName = Annotated[
    KVDtype, Meta(description="Type of the KV cache: int8 or float32; float32 for both is the reference mode")
]
Speculate = Annotated[
    bool,
    Meta(
        description="Speculative decoding: draft tokens of an n-gram (prompt-lookup) drafter are verified in the same "
        "step where that is free; answers are the same"
    ),
]
NativeKernels = Annotated[
    bool,
    Meta(description="Use our kernels: in C on a CPU that can run them, if there is a compiler; Mosaic on TPUs"),
]
GpuKernels = Annotated[
    bool,
    Meta(
        description="Use our Triton kernels on a CUDA GPU; weights of 4 to 6 bits then stay so there. No GPU has run them yet"
    ),
]
MeshData = Annotated[
    int, Meta(ge=1, le=4096, description="Data-parallel size: devices the rows of a decode batch are divided over")
]
MeshModel = Annotated[
    int,
    Meta(ge=1, le=4096, description="Tensor-parallel size: devices each layer's heads and columns are divided over"),
]
Distributed = Annotated[
    bool,
    Meta(
        description="Serve as one of several processes over one mesh; coordinator_address, num_processes and process_id are "
        "found out on Slurm, Open MPI, Kubernetes and TPU pods where they are not given"
    ),
]
CoordinatorAddress = Annotated[
    str,
    Meta(
        description="Several processes: host and port of process 0, where they find one another; it implies distributed"
    ),
]
NumProcesses = Annotated[
    int, Meta(ge=1, le=65_536, description="Several processes: how many there are; it implies distributed")
]
ProcessId = Annotated[
    int,
    Meta(
        ge=0,
        le=65_535,
        description="Several processes: which one this is, from 0; 0 serves HTTP, the others follow it; it implies "
        "distributed",
    ),
]

CalibrationSeconds = Annotated[
    float,
    Meta(
        ge=0,
        le=1e6,
        description="Seconds a model may read to have a memory fitted to it, once; a slow one reads less, down to the least "
        "that is needed (about 6 300 tokens)",
    ),
]
CalibrateInBackground = Annotated[
    bool,
    Meta(
        description="Fit the memory while the model is served without one: requests that ask for it are answered by the "
        "plain model, those with a session 503, until it is there; else the server is ready once it has been fitted"
    ),
]

PoolingName = Annotated[
    Literal["mean", "last"],
    Meta(
        description="Embeddings: the mean of the last layer's states over the text, or the last token's; null is what the "
        "model's file says, else the mean"
    ),
]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is opened with; the ranges and meanings of the fields stand at their types.

    Attributes:
      model_path: the GGUF file; None where there is an `hf_repo`.
      hf_repo: see `atlas_jax.hub.find_model`, which `offline` is for as well.
      lora: a pretrained model's; requests that say nothing get these scales.
      adapter_path: adapter of the memory; None takes the one shipped for the model, or else calibrates once and keeps
        the result in `cache_path`.
      memory_enabled: False serves the model without a memory.
      memory_path: folder of stored sessions, for one engine at a time, or of copies where there is a `session_store`; None
        keeps sessions in main memory only.
      session_store: where sessions are kept that other engines use at the same time; needs no `memory_path`.
      memory_file: file that many sessions are exported to and imported from.
      journal_sync: what was answered outlives this process in any case, on a disk.
      cache_path: folder for compiled programs, calibrated adapters and bigram tables; None is
        `$XDG_CACHE_HOME/atlas-jax`. One that cannot be written costs time at the next start, nothing else.
      threads: takes effect only if JAX has not run anything yet.
      memory_dim: numbers of a hidden state that the memory's keys keep; its matrix has the square of it in features. One
        that no adapter is there for is fitted.
      calibrate_in_background: `Engine.open` then returns before there is a memory; `Engine.fitting` tells how far it is.
      max_waiting: sequences that may wait beyond `max_concurrent`.
      owner_quota: None is all of `l3_cache_size`.
      native_kernels, gpu_kernels: those in C and in Triton are never used on a mesh.

    Raises:
      ConfigError: a value is out of its range; the message names the field.
    """

    model_path: str | os.PathLike[str] | None = None
    hf_repo: HfRepo | None = None
    offline: Offline = False
    lora: Lora = ()
    adapter_path: str | os.PathLike[str] | None = None
    memory_enabled: bool = True
    memory_path: str | os.PathLike[str] | None = None
    memory_file: FileName | None = None
    session_store: SessionStore | None = None
    session_store_endpoint: SessionStoreEndpoint | None = None
    journal_sync: JournalSync | None = None
    cache_path: str | os.PathLike[str] | None = None
    threads: Threads = 0
    max_concurrent: MaxConcurrent = 32
    max_waiting: MaxWaiting = 256
    max_context: MaxContext = 8192
    max_window: MaxWindow = 2048
    memory_dim: MemoryDim | None = None
    calibration_seconds: CalibrationSeconds = 60.0
    calibrate_in_background: CalibrateInBackground = False
    memory_budget: MemoryBudget | None = None
    l1_cache_size: L1CacheSize = 0
    l2_cache_size: L2CacheSize = 1 << 30
    l3_cache_size: L3CacheSize = 16 << 30
    owner_quota: OwnerQuota | None = None
    prefix_cache_size: PrefixCacheSize = 256 << 20
    weight_dtype: WeightDtypeName = "int8"
    kv_dtype: KVDtypeName = "int8"
    speculate: Speculate = True
    pooling: PoolingName | None = None
    native_kernels: NativeKernels = True
    gpu_kernels: GpuKernels = False
    mesh_data: MeshData = 1
    mesh_model: MeshModel = 1
    distributed: Distributed = False
    coordinator_address: CoordinatorAddress | None = None
    num_processes: NumProcesses | None = None
    process_id: ProcessId | None = None

    def __post_init__(self) -> None:
        for name, kind in _types().items():
            value = getattr(self, name)
            if name.endswith("_path"):
                if not isinstance(value, str | os.PathLike | None):
                    raise ConfigError(f"{name} must be a path, got {value!r}")
                continue
            try:
                msgspec.convert(value, kind, strict=True)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{name} is {value!r}: {error}") from None
        if (self.model_path is None) == (self.hf_repo is None):
            raise ConfigError("model_path or hf_repo must say which model to open, one of the two")
        if self.hf_repo is not None:
            try:
                Repository.parse(self.hf_repo)
            except HubError as error:
                raise ConfigError(f"hf_repo: {error}") from None
        _ = lora_files(self.lora)
        if self.mesh_data > self.max_concurrent:
            raise ConfigError(f"mesh_data ({self.mesh_data}) must not exceed max_concurrent, {self.max_concurrent}")
        if self.coordinator_address is not None:
            host, _, port = self.coordinator_address.rpartition(":")
            if not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 1 << 16:
                raise ConfigError(
                    f"coordinator_address must be a host and a port, like host0:8476, got {self.coordinator_address!r}"
                )
        if None not in (self.process_id, self.num_processes) and self.process_id >= self.num_processes:  # type: ignore[operator]
            raise ConfigError(f"process_id ({self.process_id}) must be less than num_processes, {self.num_processes}")

    def find_model(self) -> Path:
        """The model's file or folder, fetched if it has to be; raises HubError."""
        if self.model_path is not None:
            return Path(self.model_path)
        assert self.hf_repo is not None
        return find_model(self.hf_repo, offline=self.offline)

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh_data * self.mesh_model

    @property
    def several_processes(self) -> bool:
        """Whether the devices of the mesh are those of several processes."""
        given = self.coordinator_address, self.num_processes, self.process_id
        return self.distributed or given != (None, None, None)

    @property
    def cache_folder(self) -> Path:
        """`cache_path`, or the default folder."""
        return default_cache() if self.cache_path is None else Path(self.cache_path)


FIELDS = tuple(field.name for field in dataclasses.fields(EngineConfig))


def lora_files(given: Iterable[str]) -> list[tuple[Path, float]]:
    """The file and the scale of each LoRA adapter; raises ConfigError."""
    return [_lora_file(one) for one in given]


def _lora_file(given: str) -> tuple[Path, float]:
    name, equals, text = given.rpartition("=")
    try:
        scale = float(text)
    except ValueError:  # the name of a file may have such a sign
        name, equals = "", ""
    if not equals:
        name, scale = given, 1.0
    if not name:
        raise ConfigError(f"lora is {given!r}: no file is named")
    if not abs(scale) <= LORA_SCALE:
        raise ConfigError(f"lora is {given!r}: the scale must be between {-LORA_SCALE:g} and {LORA_SCALE:g}")
    return Path(name), scale


@cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(EngineConfig, include_extras=True)


def default_cache() -> Path:
    """The folder for compiled programs, calibrated adapters and bigram tables where none is named."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "atlas-jax"
