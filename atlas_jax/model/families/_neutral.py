"""Metadata keys that no family needs, and the values at which they change nothing.

Converters write many keys at their neutral value. Such a key is no reason to refuse a model; one at any other value is.
Names are those of the GGUF format without the architecture in front; what a value means is what llama.cpp does with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Neutral = Callable[[Any], bool]

IGNORED_PREFIXES = ("vision.", "audio.", "clip.", "mm.", "mm_", "projector.")
"""Keys about parts of a file that are not the text model."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(*values: Any) -> Neutral:
    """Any of these; a bool is never a number here, although Python takes it for one."""

    def neutral(value: Any) -> bool:
        return any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in values)

    return neutral


_OFF = _one_of(0)
_ONE = _one_of(1)
_UNSET_OR_ONE = _one_of(0, 1)


def _said_only(value: Any) -> bool:
    """Tells of how the model was made, or sets what the architecture has no use for."""
    return isinstance(value, bool) or _number(value)


NEUTRAL: Mapping[str, Neutral] = {
    # what the architecture does not have, at the value that says so
    **dict.fromkeys(
        (
            *("attention.clamp_kqv", "attention.max_alibi_bias", "attention.relative_buckets_count"),
            *("attention.q_lora_rank", "attention.kv_lora_rank", "attention.decay_lora_rank"),
            *("attention.iclr_lora_rank", "attention.gate_lora_rank", "attention.value_residual_mix_lora_rank"),
            *("attention.key_length_mla", "attention.value_length_mla", "attention.shared_kv_layers"),
            *("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"),
            *("embedding_length_per_layer_input", "n_deepstack_layers", "nextn_predict_layers"),
            *("swiglu_clamp_exp", "swiglu_clamp_shexp", "rescale_every_n_layers", "full_attention_interval"),
            *("rope.dimension_sections", "rope.scaling.yarn_log_multiplier", "attention.sliding_window"),
        ),
        _OFF,
    ),
    # factors: 0 is what files write where there is none
    **dict.fromkeys(
        (
            *("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale"),
            *("attention.temperature_scale", "rope.scaling.alpha"),
        ),
        _UNSET_OR_ONE,
    ),
    "rope.scaling.yarn_attn_factor": _ONE,
    "attention.causal": _one_of(True),
    "use_parallel_residual": _one_of(False),
    "swin_norm": _one_of(False),
    # what a model was called before rows were put in another order; both are the order of this architecture's files
    "tensor_data_layout": _one_of("reference", "Meta AI original pth"),
    **dict.fromkeys(
        (
            *("rope.scaling.finetuned", "rope.scaling.original_context_length", "pooling_type"),
            *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.temperature_length"),
            # these steer YaRN, and are taken where it has anything to scale
            *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
        ),
        _said_only,
    ),
}

WITHOUT_EXPERTS = frozenset(
    {"expert_used_count", "expert_shared_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"}
    | {"expert_chunk_feed_forward_length", "expert_weights_scale", "expert_weights_norm", "expert_gating_func"}
    | {"expert_group_count", "expert_group_used_count", "expert_group_scale", "experts_per_group"}
    | {"leading_dense_block_count", "interleave_moe_layer_step", "moe_every_n_layers", "moe_latent_size"}
)
"""Keys about experts, which say nothing in a model that has none."""

WITHOUT_WINDOW = frozenset(
    {"attention.sliding_window_pattern", "rope.freq_base_swa", "rope.dimension_count_swa"}
    | {"attention.key_length_swa", "attention.value_length_swa"}
)
"""Keys about layers with a sliding window, which say nothing in a model that has none."""
