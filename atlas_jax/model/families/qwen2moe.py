"""Qwen 1.5 and 2 with experts: one of them is used by all tokens."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import EXPERTS, LAYER, Checkpoint, Config, Described
from atlas_jax.model.families._family import Family, Fields, Vocabulary
from atlas_jax.model.families.qwen2 import describe


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, experts=fields.experts(normalised=False, shared=True))


def _describe(config: Config) -> Described:
    config.same("norm_topk_prob", False)
    config.same("decoder_sparse_step", 1)
    described = describe(config)
    described.metadata.update(
        {
            "expert_count": config.integer("num_experts"),
            "expert_used_count": config.integer("num_experts_per_tok"),
            "expert_feed_forward_length": config.integer("moe_intermediate_size"),
            "expert_shared_feed_forward_length": config.integer("shared_expert_intermediate_size"),
        }
    )
    return described


_SHARED = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


FAMILY = Family(
    "qwen2moe",
    "Qwen 1.5 and 2 with experts",
    _config,
    checkpoint=Checkpoint(
        classes=("Qwen2MoeForCausalLM",),
        describe=_describe,
        layer={**LAYER, **EXPERTS, **_SHARED, "post_attention_layernorm": "ffn_norm"},
    ),
)
