"""Trainable ATLAS language models: memory layers, attention, and models that mix them by a pattern string."""

from __future__ import annotations

from atlas_jax.model.lm.attention import Attention, attend, window_attend
from atlas_jax.model.lm.blocks import Block, MemoryAsContext, MemoryAsGate, MemoryAsLayer, make_block
from atlas_jax.model.lm.config import LAYER_KINDS, GateStart, LMConfig
from atlas_jax.model.lm.data import IGNORE, Batch, BatchSource, Source, pack, text_batches
from atlas_jax.model.lm.deep import DeepMemory, deep_memory
from atlas_jax.model.lm.export import export_gguf, import_gguf
from atlas_jax.model.lm.generate import generate
from atlas_jax.model.lm.memory import Gates, MemoryLayer, MixedMemory
from atlas_jax.model.lm.metrics import CSVMetrics, MetricsCallback
from atlas_jax.model.lm.model import (
    LanguageModel,
    LMParams,
    create,
    cross_entropy,
    init_params,
    matrix_axes,
    parameter_count,
    split,
)
from atlas_jax.model.lm.streaming import MAX_CHUNK, LMState, bounded, extend, init_state, logits

__all__ = [
    "IGNORE",
    "LAYER_KINDS",
    "MAX_CHUNK",
    "Attention",
    "Batch",
    "BatchSource",
    "Block",
    "CSVMetrics",
    "DeepMemory",
    "GateStart",
    "Gates",
    "LMConfig",
    "LMParams",
    "LMState",
    "LanguageModel",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryLayer",
    "MetricsCallback",
    "MixedMemory",
    "Source",
    "attend",
    "bounded",
    "create",
    "cross_entropy",
    "deep_memory",
    "export_gguf",
    "extend",
    "generate",
    "import_gguf",
    "init_params",
    "init_state",
    "logits",
    "make_block",
    "matrix_axes",
    "pack",
    "parameter_count",
    "split",
    "text_batches",
    "window_attend",
]
