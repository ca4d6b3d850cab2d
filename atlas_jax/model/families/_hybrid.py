"""What families with Gated DeltaNet layers have in common."""

from __future__ import annotations

from atlas_jax.config import DeltaNetConfig, ExpertsConfig, LayerConfig, ModelConfig
from atlas_jax.model.families._family import Fields, Vocabulary

_PERIOD = 4
"""Every fourth layer is one of attention, unless the file says otherwise."""
_MAX_HEADS, _MAX_DIM, _MAX_CONV = 1 << 12, 1 << 12, 64


def hybrid(
    fields: Fields, vocabulary: Vocabulary, *, tiled: bool = False, experts: ExpertsConfig | None = None
) -> ModelConfig:
    """A model with Gated DeltaNet layers between those of gated attention.

    Args:
      tiled: see `DeltaNetConfig`.
    """
    heads = fields.integer("ssm.time_step_rank", 1, _MAX_HEADS)
    dim = fields.integer("ssm.state_size", 1, _MAX_DIM)
    fields.same("ssm.inner_size", heads * dim)
    embed = fields.integer("embedding_length", 1)
    fields.text_sections(fields.rotated(fields.head_dim(embed, fields.heads()[0])))
    return fields.model(
        vocabulary,
        layers=[LayerConfig(kind="delta_net" if one else "attention") for one in fields.recurrent(_PERIOD)],
        delta_net=DeltaNetConfig(
            heads=heads,
            key_heads=fields.divisor("ssm.group_count", heads),
            dim=dim,
            conv=fields.integer("ssm.conv_kernel", 2, _MAX_CONV),
            tiled=tiled,
        ),
        attention_gate=True,
        qk_norm="head",
        experts=experts,
    )
