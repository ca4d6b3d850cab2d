"""Llama and the models that share its architecture name in GGUF (Llama 1–3, SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig, RopeConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, linear, llama3_factors
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, UnsupportedModel, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    heads, kv_heads = fields.heads()
    head_dim = fields.head_dim(embed, heads)
    config = ModelConfig(
        family="llama",
        vocab=fields.vocabulary(vocabulary),
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ff=fields.integer("feed_forward_length", 1),
        layers=(LayerConfig(),) * fields.layers,
        ropes=(
            RopeConfig(
                base=fields.rope_base("rope.freq_base", default=10_000.0),
                dims=fields.rotated(head_dim),
                position_scale=fields.rope_scale(),
                interleaved=True,
            ),
        ),
        context_length=fields.context_length(),
        norm_eps=fields.norm_eps(),
    )
    fields.finish()
    return config


def _describe(config: Config) -> Described:
    config.same("hidden_act", "silu")
    config.same("rope_interleaved", False)
    found = decoder(config)
    # Mistral's class has a window, which this architecture has not
    window = config.get("sliding_window")
    if isinstance(window, int) and window < found["context_length"]:
        raise UnsupportedModel(f"config.json: 'sliding_window' is {window}, less than the context: not supported here")
    base, scaling = config_rope(config, 10_000.0)
    dims = found.get("attention.key_length") or found["embedding_length"] // max(1, found["attention.head_count"])
    tensors = {}
    if scaling["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(base, dims, scaling)
    tied = config.get("tie_word_embeddings") is True
    return Described(found | {"rope.freq_base": base} | linear(scaling), tensors, tied)


FAMILY = Family(
    "llama",
    "Llama 1–3, SmolLM2, TinyLlama and others of that name",
    _config,
    frequency_factors=True,
    checkpoint=Checkpoint(
        classes=("LlamaForCausalLM", "MistralForCausalLM"),
        describe=_describe,
        layer={**LAYER, "post_attention_layernorm": "ffn_norm"},
        interleaved=frozenset({"attn_q", "attn_k"}),
    ),
)
