"""Phi 3, 3.5 and 4: Llama with its input matrices in one tensor each, and LongRoPE."""

from __future__ import annotations

import math

import numpy as np

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, as_float, decoder, refused
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    # what files name as the window is not the models' own; llama.cpp attends to everything
    fields.no_window()
    return fields.model(vocabulary, rope_base=fields.rope_base("rope.freq_base", default=10_000.0))


def _describe(config: Config) -> Described:
    config.same("hidden_act", "silu")
    found = decoder(config, partial=True)
    found["attention.sliding_window"] = config.get("sliding_window") or 0  # nothing attends by it
    context = found["context_length"]
    original = config.integer("original_max_position_embeddings", context)
    base, scaling = config_rope(config, 10_000.0, kinds=("longrope", "su"))
    found |= {"rope.freq_base": base, "rope.scaling.original_context_length": original}
    tensors = {}
    if scaling["rope_type"] != "default":
        for name in ("long", "short"):
            factors = scaling.get(f"{name}_factor")
            if not isinstance(factors, list) or len(factors) != found["rope.dimension_count"] // 2:
                raise refused(f"rope_scaling.{name}_factor", f"must have {found['rope.dimension_count'] // 2} numbers")
            numbers = [as_float(f"rope_scaling.{name}_factor", one) for one in factors]
            tensors[f"rope_factors_{name}.weight"] = np.array(numbers, np.float32)
        longer = context / max(1, original)
        magnitude = math.sqrt(1.0 + math.log(longer) / math.log(max(2, original))) if longer > 1 else 1.0
        found["rope.scaling.attn_factor"] = float(np.float32(magnitude))
    return Described(found, tensors, tied=config.get("tie_word_embeddings") is True)


FAMILY = Family(
    "phi3",
    "Phi 3, 3.5 and 4, without experts",
    _config,
    frequency_factors=True,
    checkpoint=Checkpoint(
        classes=("Phi3ForCausalLM",),
        describe=_describe,
        layer={
            **LAYER,
            "post_attention_layernorm": "ffn_norm",
            "self_attn.qkv_proj": "attn_qkv",
            "mlp.gate_up_proj": "ffn_up",
        },
    ),
)
