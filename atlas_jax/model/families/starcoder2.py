"""StarCoder 2: LayerNorm, biases everywhere, an MLP without a gate."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, scaled
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, norm="layer", gated=False, activation="gelu_tanh")


def _describe(config: Config) -> Described:
    config.same("hidden_act", "gelu_pytorch_tanh")
    config.same("norm_type", "layer_norm")
    config.same("mlp_type", "default")
    config.get("use_bias")  # the tensors say it
    config.get("sliding_window")  # of half of the trained context; no runtime of its GGUF files has it
    found = decoder(config, layer_norm="norm_epsilon")
    base, scaling = config_rope(config, 10_000.0)
    found |= {"rope.freq_base": base} | scaled(scaling, found["context_length"])
    return Described(found, tied=config.get("tie_word_embeddings") is not False)


FAMILY = Family(
    "starcoder2",
    "StarCoder 2",
    _config,
    checkpoint=Checkpoint(
        classes=("Starcoder2ForCausalLM",),
        describe=_describe,
        layer={
            **LAYER,
            "post_attention_layernorm": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
    ),
)
