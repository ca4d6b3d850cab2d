"""Rotary position embedding whose angles stay exact at any position.

float32 cannot hold `position * frequency` for positions in the 100 000s (at 131 072 the error is 0.008 rad). A position
is written in base 1 024 instead; each digit's rotation comes from a table computed in float64, and rotations compose:
cos and sin are right to float32 rounding up to position 2³⁰. Digits that are zero rotate by exactly (1, 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import RopeConfig
from atlas_jax.typing import Array, Float, Int32

_DIGIT = 1024
_DIGITS = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RopeTable:
    """cos and sin of every digit's angle.

    Attributes:
      cos, sin: float32 [3, 1024, dims / 2]; first axis: units, 1 024s, 1 048 576s.
    """

    cos: Float[Array, "digits 1024 half"]
    sin: Float[Array, "digits 1024 half"]


def frequencies(config: RopeConfig) -> np.ndarray:
    """Radians per position of each pair, float64 [dims / 2]."""
    exponent = np.arange(0, config.dims, 2, dtype=np.float64) / config.dims
    inverse = config.position_scale * config.base**-exponent
    return inverse if config.frequency_factors is None else inverse / np.asarray(config.frequency_factors, np.float64)


def rope_table(config: RopeConfig) -> RopeTable:
    """Computes the tables in float64 and rounds once."""
    positions = np.arange(_DIGIT, dtype=np.float64)[None] * (float(_DIGIT) ** np.arange(_DIGITS))[:, None]
    turns = positions[..., None] * (frequencies(config) / (2 * np.pi))
    angle = (turns - np.floor(turns)) * (2 * np.pi)
    return RopeTable(jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))


def rotations(
    table: RopeTable, positions: Int32[Array, "*rows"]
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """cos and sin at absolute positions in 0 … 2³⁰ − 1."""
    cos, sin = table.cos[0, positions % _DIGIT], table.sin[0, positions % _DIGIT]
    for digit in range(1, _DIGITS):
        positions = positions // _DIGIT
        c, s = table.cos[digit, positions % _DIGIT], table.sin[digit, positions % _DIGIT]
        cos, sin = cos * c - sin * s, cos * s + sin * c
    return cos, sin


def apply_rope(
    x: Float[Array, "*rows heads D"], cos: Float[Array, "*rows half"], sin: Float[Array, "*rows half"]
) -> Float[Array, "*rows heads D"]:
    """Rotates pairs (i, i + dims/2) of the first `dims` dimensions; the rest pass through.

    Weights stored for interleaved pairs are permuted once when they are loaded: q·k does not change when both are
    permuted alike.
    """
    half = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=-1)
