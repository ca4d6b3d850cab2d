"""Command R and R+, Aya 23: LayerNorm without bias, MLP and attention side by side, a factor on logits."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(
        vocabulary,
        interleaved=True,
        norm="layer",
        parallel=True,
        qk_norm="heads" if fields.has("attn_q_norm.weight") else None,
        logit_scale=fields.factor("logit_scale"),
    )


def _describe(config: Config) -> Described:
    config.same("hidden_act", "silu")
    config.get("use_qk_norm")  # the tensors say it
    found = decoder(config, layer_norm="layer_norm_eps")
    # what the model was trained on where that is more than max_position_embeddings
    found["context_length"] = config.integer("model_max_length", found["context_length"])
    base, _ = config_rope(config, 10_000.0, kinds=())
    found |= {"rope.freq_base": base, "rope.scaling.type": "none", "logit_scale": config.number("logit_scale", 0.0625)}
    return Described(found, tied=config.get("tie_word_embeddings") is not False)


FAMILY = Family(
    "command-r",
    "Command R and R+, Aya 23",
    _config,
    checkpoint=Checkpoint(
        classes=("CohereForCausalLM",),
        describe=_describe,
        layer=LAYER,
    ),
)
