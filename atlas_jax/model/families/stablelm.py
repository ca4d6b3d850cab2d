"""StableLM 3B and 2: LayerNorm, and a part of each head rotates; the 12B model runs MLP and attention side by side."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, scaled
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    # converters write this key as true for models that have it not, so the norm that is not there decides
    fields.truth("use_parallel_residual", default=True)
    return fields.model(
        vocabulary,
        rope_base=fields.rope_base("rope.freq_base", default=10_000.0),
        norm="layer",
        parallel=not fields.has("ffn_norm.weight"),
        qk_norm="heads" if fields.has("attn_q_norm.weight") else None,
    )


def _describe(config: Config) -> Described:
    config.same("hidden_act", "silu")
    for key in ("use_qkv_bias", "qk_layernorm"):  # the tensors say it
        config.get(key)
    found = decoder(config, layer_norm="layer_norm_eps", partial=True)
    found["use_parallel_residual"] = config.get("use_parallel_residual") is True
    base, scaling = config_rope(config, 10_000.0)
    found |= {"rope.freq_base": base} | scaled(scaling, found["context_length"])
    return Described(found, tied=config.get("tie_word_embeddings") is True)


FAMILY = Family(
    "stablelm",
    "StableLM 3B and StableLM 2",
    _config,
    checkpoint=Checkpoint(
        classes=("StableLmForCausalLM",),
        describe=_describe,
        layer={
            **LAYER,
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_layernorm.norms.*": "attn_q_norm",
            "self_attn.k_layernorm.norms.*": "attn_k_norm",
        },
    ),
)
