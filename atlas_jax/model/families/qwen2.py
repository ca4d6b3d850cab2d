"""Qwen 2 and 2.5 (dense): Llama with biases on queries, keys and values."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, scaled, whole_attention
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary)


def describe(config: Config, default_base: float = 10_000.0, *, head_dim: int | None = None) -> Described:
    """What the configurations of Qwen's models say alike; the defaults are of the class."""
    config.same("hidden_act", "silu")
    found = decoder(config, {} if head_dim is None else {"head_dim": head_dim})
    whole_attention(config, found["context_length"] if config.get("use_sliding_window") else 0)
    base, scaling = config_rope(config, default_base)
    found |= {"rope.freq_base": base} | scaled(scaling, found["context_length"])
    return Described(found, tied=config.get("tie_word_embeddings") is True)


FAMILY = Family(
    "qwen2",
    "Qwen 2 and 2.5, dense",
    _config,
    checkpoint=Checkpoint(
        classes=("Qwen2ForCausalLM",),
        describe=describe,
        layer={**LAYER, "post_attention_layernorm": "ffn_norm"},
    ),
)
