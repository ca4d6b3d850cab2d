"""Qwen 3 (dense): Llama with norms on queries and keys."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described
from atlas_jax.model.families._family import Family, Fields, Vocabulary
from atlas_jax.model.families.qwen2 import describe


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, qk_norm="head")


def _describe(config: Config) -> Described:
    return describe(config, 1_000_000.0, head_dim=128)


FAMILY = Family(
    "qwen3",
    "Qwen 3, dense",
    _config,
    checkpoint=Checkpoint(
        classes=("Qwen3ForCausalLM",),
        describe=_describe,
        layer={**LAYER, "post_attention_layernorm": "ffn_norm"},
    ),
)
