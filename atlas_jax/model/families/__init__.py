"""Families of models by GGUF architecture name. A new family is a new module here and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping

from atlas_jax.model.families import (
    command_r,
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    internlm2,
    llama,
    olmo2,
    phi3,
    qwen2,
    qwen2moe,
    qwen3,
    qwen3moe,
    qwen3next,
    qwen35,
    smollm3,
    stablelm,
    starcoder2,
)
from atlas_jax.model.families._family import Family, UnsupportedModel

FAMILIES: Mapping[str, Family] = {
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2moe": qwen2moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3moe": qwen3moe.FAMILY,
    "qwen3next": qwen3next.FAMILY,
    "qwen35": qwen35.FAMILY,
    "qwen35moe": qwen35.WITH_EXPERTS,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": gemma3.FAMILY,
    "phi3": phi3.FAMILY,
    "smollm3": smollm3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "granite": granite.FAMILY,
    "internlm2": internlm2.FAMILY,
    "stablelm": stablelm.FAMILY,
    "starcoder2": starcoder2.FAMILY,
    "command-r": command_r.FAMILY,
    "gpt-oss": gpt_oss.FAMILY,
}

__all__ = ["FAMILIES", "Family", "UnsupportedModel"]
