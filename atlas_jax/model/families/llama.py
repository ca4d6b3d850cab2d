"""Llama and the models that share its architecture name in GGUF (Llama 1–3, SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig, RopeConfig
from atlas_jax.model.families._family import Family, Fields, UnsupportedModel


def _config(fields: Fields, vocab: int) -> ModelConfig:
    layers = fields.take("block_count", int)
    embed = fields.take("embedding_length", int)
    heads = fields.take("attention.head_count", int)
    if heads <= 0 or not 0 < layers <= 1024:
        raise UnsupportedModel(f"metadata gives {layers} layers of {heads} heads")
    head_dim = fields.take_optional("attention.key_length", int) or embed // heads
    fields.expect("attention.value_length", head_dim)
    fields.expect("vocab_size", vocab)
    fields.expect("expert_count", 0)
    fields.expect("rope.scaling.type", "none", "linear")
    factor = fields.take_optional("rope.scaling.factor", float) or 1.0
    config = ModelConfig(
        family="llama",
        vocab=vocab,
        embed=embed,
        heads=heads,
        kv_heads=fields.take_optional("attention.head_count_kv", int) or heads,
        head_dim=head_dim,
        ff=fields.take("feed_forward_length", int),
        layers=(LayerConfig(),) * layers,
        ropes=(
            RopeConfig(
                base=fields.take_optional("rope.freq_base", float) or 10_000.0,
                dims=fields.take_optional("rope.dimension_count", int) or head_dim,
                position_scale=1.0 / factor,
                interleaved=True,
            ),
        ),
        context_length=fields.take("context_length", int),
        norm_eps=fields.take("attention.layer_norm_rms_epsilon", float),
    )
    fields.finish()
    return config


FAMILY = Family("llama", _config)
