"""The seam between engine and server: requests, events, errors, and the facts a server can ask for.

Plain frozen dataclasses, no JAX: the server, its tests and the engine meet here and nowhere else. Values are validated where
they enter (the server's schemas); the engine only re-checks what it would crash on.
"""

from atlas_jax.config import MAX_LOGIT_BIAS
from atlas_jax.engine.api.errors import (
    EngineError,
    InvalidRequest,
    MemoryUnavailable,
    Overloaded,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    SnapshotInvalid,
    StorageFull,
)
from atlas_jax.engine.api.events import (
    Delta,
    Embedded,
    Event,
    Failed,
    Finished,
    FinishReason,
    HistoryEffect,
    Listener,
    MemoryStats,
    Prompt,
    TokenInfo,
)
from atlas_jax.engine.api.info import (
    EngineStats,
    Fitting,
    LayerMemoryInfo,
    LoraInfo,
    MemoryInfo,
    ModelInfo,
    SaveResult,
    SessionInfo,
    SetAside,
    SlotInfo,
    StateBytes,
    StoredFile,
    TemplateFacts,
)
from atlas_jax.engine.api.protocols import DocumentStore, EngineProtocol, Handle, SessionStore, Tokenizer
from atlas_jax.engine.api.requests import (
    ChatFrame,
    GenerationRequest,
    MemoryParams,
    Pooling,
    SamplingParams,
    SessionKey,
)
from atlas_jax.engine.memory_options import CacheStrategy
from atlas_jax.grammar.calls import CallGrammar, CallShape
from atlas_jax.grammar.shape import AnswerShape

__all__ = [
    "MAX_LOGIT_BIAS",
    "AnswerShape",
    "CacheStrategy",
    "CallGrammar",
    "CallShape",
    "ChatFrame",
    "Delta",
    "DocumentStore",
    "Embedded",
    "EngineError",
    "EngineProtocol",
    "EngineStats",
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "Fitting",
    "GenerationRequest",
    "Handle",
    "HistoryEffect",
    "InvalidRequest",
    "LayerMemoryInfo",
    "Listener",
    "LoraInfo",
    "MemoryInfo",
    "MemoryParams",
    "MemoryStats",
    "MemoryUnavailable",
    "ModelInfo",
    "Overloaded",
    "Pooling",
    "Prompt",
    "SamplingParams",
    "SaveResult",
    "SessionConflict",
    "SessionExists",
    "SessionInfo",
    "SessionKey",
    "SessionNotFound",
    "SessionStore",
    "SetAside",
    "SlotInfo",
    "SnapshotInvalid",
    "StateBytes",
    "StorageFull",
    "StoredFile",
    "TemplateFacts",
    "TokenInfo",
    "Tokenizer",
]
