"""Qwen 3 with experts."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import EXPERTS, LAYER, Checkpoint, Config, Described, refused
from atlas_jax.model.families._family import Family, Fields, Vocabulary
from atlas_jax.model.families.qwen2 import describe


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, qk_norm="head", experts=fields.experts(normalised=True))


def _describe(config: Config) -> Described:
    if config.get("norm_topk_prob") is not True:  # of a configuration that does not say so it is false
        raise refused("norm_topk_prob", "must be true")
    config.same("decoder_sparse_step", 1)
    described = describe(config, 1_000_000.0, head_dim=128)
    described.metadata.update(
        {
            "expert_count": config.integer("num_experts"),
            "expert_used_count": config.integer("num_experts_per_tok"),
            "expert_feed_forward_length": config.integer("moe_intermediate_size"),
        }
    )
    return described


FAMILY = Family(
    "qwen3moe",
    "Qwen 3 with experts",
    _config,
    checkpoint=Checkpoint(
        classes=("Qwen3MoeForCausalLM",),
        describe=_describe,
        layer={**LAYER, **EXPERTS, "post_attention_layernorm": "ffn_norm"},
    ),
)
