"""Trainable ATLAS language models: memory layers, attention, and models that mix them by a pattern string."""

from __future__ import annotations

from atlas_jax.model.lm.attention import Attention, attend, window_attend
from atlas_jax.model.lm.blocks import Block, MemoryAsContext, MemoryAsGate, MemoryAsLayer, make_block
from atlas_jax.model.lm.config import LAYER_KINDS, GateStart, LMConfig
from atlas_jax.model.lm.deep import DeepMemory, deep_memory
from atlas_jax.model.lm.memory import Gates, MemoryLayer
from atlas_jax.model.lm.model import (
    IGNORE,
    LanguageModel,
    LMParams,
    create,
    cross_entropy,
    matrix_axes,
    parameter_count,
    split,
)

__all__ = [
    "IGNORE",
    "LAYER_KINDS",
    "Attention",
    "Block",
    "DeepMemory",
    "GateStart",
    "Gates",
    "LMConfig",
    "LMParams",
    "LanguageModel",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryLayer",
    "attend",
    "create",
    "cross_entropy",
    "deep_memory",
    "make_block",
    "matrix_axes",
    "parameter_count",
    "split",
    "window_attend",
]
