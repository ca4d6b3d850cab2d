"""Gemma 2: every other layer has a window, scores and logits have soft caps, sublayers have norms on their outputs."""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig
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


FAMILY = Family("gemma2", "Gemma 2", _config)
