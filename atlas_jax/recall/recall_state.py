"""What the recall memories of a batch of sessions hold, and how each is read and written."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.config import MemoryConfig
from atlas_jax.typing import Array, Bool, Float, Int8, Int32, UInt8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecallState:
    """Memories of a batch of sessions.

    Attributes:
      weights, scale: M in 8 bits with a scale per output.
      momentum, momentum_end: S of the Muon write as A in S = AΦ, Φ the features of the Omega window that ended at
        `momentum_end`.
      states, tokens: ring of the last states and tokens of the text, which keys are made of; position p is at p mod ring.
      told: what the memory said after each token, its value code's signs as bits: all 0 where it had nothing to say.
      seen: 1 for tokens that have been written as values.
      loss: Omega loss after the last write.
      losses, skipped: since the row was taken up: the sum of the losses of its writes, and how many were not taken.
      written: whether any token has been seen; without one, reading is of no use.
    """

    weights: Int8[Array, "B C M"]
    scale: Float[Array, "B C"]
    momentum: Float[Array, "B C W"]
    momentum_end: Int32[Array, B]
    states: Int8[Array, "B ring Z"]
    tokens: Int32[Array, "B ring"]
    told: UInt8[Array, "B ring bytes"]
    seen: Int8[Array, "B V"]
    loss: Float[Array, B]
    losses: Float[Array, B]
    skipped: Int32[Array, B]
    written: Bool[Array, B]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecallSettings:
    """How each row of a batch uses its memory.

    Attributes:
      layers: index of the number of layers in use, less one.
      degree: polynomial degree, less one.
      read: whether the memory is read in the answer at all.
      read_from: position from which it does (`warmup_tokens`).
      log_odds: ln(blend / (1 − blend)), added to the gate's log odds.
    """

    layers: Int32[Array, B]
    degree: Int32[Array, B]
    read: Bool[Array, B]
    read_from: Int32[Array, B]
    log_odds: Float[Array, B]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WriteSettings:
    """One write.

    Attributes:
      end: position of the first token that has not left the window.
      window: tokens in the Omega objective.
      step: factor on the calibrated inner step of gradient and Muon.
      degree: polynomial degree, less one.
    """

    end: Int32[Array, ""]
    window: Int32[Array, ""]
    step: Float[Array, ""]
    degree: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answer:
    """What a memory says after each token of a step.

    Attributes:
      found: M φ(k).
      cues: what the gate knows beside it: the state of the best tapped layer, of unit length, which tells a question from
        prose and an answer from its end, and how far the memory has been right of late (`_agreement`).
    """

    found: Float[Array, "B T C"]
    cues: Float[Array, "B T cues"]


def init_state(config: MemoryConfig, batch: int, vocab: int) -> RecallState:
    """Empty memories."""
    return RecallState(
        weights=jnp.zeros((batch, config.code_dim, config.features), jnp.int8),
        scale=jnp.zeros((batch, config.code_dim), jnp.float32),
        momentum=jnp.zeros((batch, config.code_dim, config.max_omega_window), jnp.float16),
        momentum_end=jnp.zeros((batch,), jnp.int32),
        states=jnp.zeros((batch, config.ring, config.components), jnp.int8),
        tokens=jnp.zeros((batch, config.ring), jnp.int32),
        told=jnp.zeros((batch, config.ring, -(-config.code_dim // 8)), jnp.uint8),
        seen=jnp.zeros((batch, vocab), jnp.int8),
        loss=jnp.zeros((batch,), jnp.float32),
        losses=jnp.zeros((batch,), jnp.float32),
        skipped=jnp.zeros((batch,), jnp.int32),
        written=jnp.zeros((batch,), bool),
    )


def init_settings(batch: int) -> RecallSettings:
    """Rows without a memory."""
    index = jnp.zeros((batch,), jnp.int32)
    return RecallSettings(
        layers=index,
        degree=jnp.ones((batch,), jnp.int32),
        read=jnp.zeros((batch,), bool),
        read_from=jnp.zeros((batch,), jnp.int32),
        log_odds=jnp.zeros((batch,), jnp.float32),
    )
