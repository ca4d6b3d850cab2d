"""Llama and the models that share its architecture name in GGUF (Llama 1–3, Mistral, SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, llama3_factors, scaled
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, UnsupportedModel, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    # of the first Mistral, whose files may name it; llama.cpp attends to everything, and later ones have none
    fields.no_window()
    return fields.model(
        vocabulary,
        interleaved=True,
        rope_base=fields.rope_base("rope.freq_base", default=10_000.0),
        experts=fields.experts(normalised=True),
    )


def _describe(config: Config) -> Described:
    config.same("hidden_act", "silu")
    config.same("rope_interleaved", False)
    found = decoder(config)
    # Mistral's class has a window, which this architecture has not
    window = config.get("sliding_window")
    if isinstance(window, int) and window < found["context_length"]:
        raise UnsupportedModel(f"config.json: 'sliding_window' is {window}, less than the context: not supported here")
    base, scaling = config_rope(config, 10_000.0, kinds=("linear", "yarn", "llama3"))
    dims = found.get("attention.key_length") or found["embedding_length"] // max(1, found["attention.head_count"])
    tensors = {}
    if scaling["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(base, dims, scaling)
    tied = config.get("tie_word_embeddings") is True
    if config.get("num_local_experts") is not None:
        found |= {
            "expert_count": config.integer("num_local_experts"),
            "expert_used_count": config.integer("num_experts_per_tok"),
        }
    return Described(found | {"rope.freq_base": base} | scaled(scaling, found["context_length"]), tensors, tied)


_MIXTRAL = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.*.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.*.w3": "ffn_up_exps",
    "block_sparse_moe.experts.*.w2": "ffn_down_exps",
}


FAMILY = Family(
    "llama",
    "Llama 1–3, Mistral, Mixtral, SmolLM2, TinyLlama and others of that name",
    _config,
    frequency_factors=True,
    checkpoint=Checkpoint(
        classes=("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        describe=_describe,
        layer={**LAYER, **_MIXTRAL, "post_attention_layernorm": "ffn_norm"},
        interleaved=frozenset({"attn_q", "attn_k"}),
    ),
)
