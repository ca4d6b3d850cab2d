"""Gemma 3 (text): five sliding-window layers to one global, norms on q, k and sublayer outputs, scaled embeddings."""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig, RopeConfig
from atlas_jax.model.families._family import Family, Fields, UnsupportedModel

_PATTERN = 6
"""Every sixth layer is global; GGUF files of this family do not say so."""
_LOCAL_ROPE_BASE = 10_000.0


def _config(fields: Fields, vocab: int) -> ModelConfig:
    layers = fields.take("block_count", int)
    embed = fields.take("embedding_length", int)
    heads = fields.take("attention.head_count", int)
    if heads <= 0 or not 0 < layers <= 1024:
        raise UnsupportedModel(f"metadata gives {layers} layers of {heads} heads")
    head_dim = fields.take("attention.key_length", int)
    window = fields.take("attention.sliding_window", int)
    fields.expect("attention.value_length", head_dim)
    fields.expect("vocab_size", vocab)
    fields.expect("attention.sliding_window_pattern", _PATTERN)
    fields.expect("rope.scaling.type", "none", "linear")
    factor = fields.take_optional("rope.scaling.factor", float) or 1.0
    local_base = fields.take_optional("rope.freq_base_swa", float) or _LOCAL_ROPE_BASE
    base = fields.take("rope.freq_base", float)
    config = ModelConfig(
        family="gemma3",
        vocab=vocab,
        embed=embed,
        heads=heads,
        kv_heads=fields.take("attention.head_count_kv", int),
        head_dim=head_dim,
        ff=fields.take("feed_forward_length", int),
        layers=tuple(
            LayerConfig(rope=0) if (index + 1) % _PATTERN == 0 else LayerConfig(sliding_window=window, rope=1)
            for index in range(layers)
        ),
        ropes=(
            RopeConfig(base=base, dims=head_dim, position_scale=1.0 / factor, interleaved=False),
            RopeConfig(base=local_base, dims=head_dim, interleaved=False),
        ),
        context_length=fields.take("context_length", int),
        norm_eps=fields.take("attention.layer_norm_rms_epsilon", float),
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        embed_scale=float(embed) ** 0.5,
        # the 27B model scales by (embed / heads)^-½ instead; it is the only one of the family with 62 layers
        attention_scale=(embed / heads) ** -0.5 if layers == 62 else None,
        final_softcap=fields.take_optional("final_logit_softcapping", float),
    )
    fields.finish()
    return config


FAMILY = Family("gemma3", _config)
