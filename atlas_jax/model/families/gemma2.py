"""Gemma 2: every other layer has a window, scores and logits have soft caps, sublayers have norms on their outputs."""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, refused, scaled
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, Vocabulary

_WINDOW, _PERIOD = 4096, 2
_ATTENTION_SOFTCAP, _FINAL_SOFTCAP, _MAX_SOFTCAP = 50.0, 30.0, 1e6
"""Caps of a file that does not name them."""


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    heads, _ = fields.heads()
    window = fields.integer("attention.sliding_window", 1, default=_WINDOW)
    return fields.model(
        vocabulary,
        rope_base=fields.rope_base("rope.freq_base", default=10_000.0),
        layers=[LayerConfig(sliding_window=window if sliding else None) for sliding in fields.sliding(_PERIOD)],
        activation="gelu_tanh",
        post_norms=True,
        embed_scale=float(embed) ** 0.5,
        # the 27B model scales by (embed / heads)^-½ instead of its heads' size; the only one of the family with 46 layers
        attention_scale=(embed / heads) ** -0.5 if fields.layers == 46 else None,
        attention_softcap=_cap(fields, "attn_logit_softcapping", _ATTENTION_SOFTCAP),
        final_softcap=_cap(fields, "final_logit_softcapping", _FINAL_SOFTCAP),
    )


def _cap(fields: Fields, key: str, default: float) -> float | None:
    return fields.number(key, 0.0, _MAX_SOFTCAP, default=default) or None


def _describe(config: Config) -> Described:
    config.same("hidden_act", "gelu_pytorch_tanh")
    config.same("hidden_activation", "gelu_pytorch_tanh")
    found = decoder(config, {"head_dim": 256})
    layers, heads = found["block_count"], found["attention.head_count"]
    usual = found["embedding_length"] / max(1, heads) if layers == 46 else found["attention.key_length"]
    config.same("query_pre_attn_scalar", usual)
    types = config.get("layer_types")
    wanted = [("sliding" if index % _PERIOD == 0 else "full") + "_attention" for index in range(layers)]
    if types and types != wanted:
        raise refused("layer_types", "must have a window in every other layer, beginning with the first")
    base, scaling = config_rope(config, 10_000.0)
    found |= {
        "rope.freq_base": base,
        "attention.sliding_window": config.integer("sliding_window", _WINDOW),
        "attn_logit_softcapping": config.number("attn_logit_softcapping", _ATTENTION_SOFTCAP),
        "final_logit_softcapping": config.number("final_logit_softcapping", _FINAL_SOFTCAP),
    }
    return Described(
        found | scaled(scaling, found["context_length"]), tied=config.get("tie_word_embeddings") is not False
    )


FAMILY = Family(
    "gemma2",
    "Gemma 2",
    _config,
    checkpoint=Checkpoint(
        classes=("Gemma2ForCausalLM",),
        describe=_describe,
        layer={
            **LAYER,
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        norms_plus_one=True,
    ),
)
