"""What a memory carries from token to token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.memory._params import Params, Weights
from atlas_jax.memory._rule import MemoryRule
from atlas_jax.typing import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryState:
    """A memory between two tokens. Nothing in it is shared between the rows of a batch but `phase`.

    Attributes:
      weights: W; with `ns_per` chunk, as it was when the chunk began; for the optimizer `exact`, empty.
      anchor: the weights that gradients are taken at; empty where they are W itself, or play no part.
      momentum: S, shaped as `weights`; empty for an optimizer without.
      tail_k, tail_v, tail_gate: the c − 1 tokens before, as they came: keys, values and γ; γ = 0 where there are none.
      moments: for `exact`, Σ φφᵀ and Σ vφᵀ, decayed; else empty.
      pending: with `ns_per` chunk, the retention and the step that the chunk has gathered, [..., 2, channels]; else
        empty.
      phase: tokens since the anchor; the same for every row. A NumPy array where it is known while a function is traced,
        as at the start: `chunked` then knows how many chunks there are, which makes it faster (`titans` with
        backward, 4 × 2 048 tokens: 155 ms instead of 199, a third less memory).
    """

    weights: Weights
    anchor: Weights
    momentum: Weights
    tail_k: Float[Array, "*batch reach d_k"]
    tail_v: Float[Array, "*batch reach d_v"]
    tail_gate: Float[Array, "*batch reach"]
    moments: dict[str, jax.Array]
    pending: dict[str, jax.Array]
    phase: Int32[Array, ""]


def init_state(rule: MemoryRule, params: Params, batch: tuple[int, ...] = ()) -> MemoryState:
    """A memory that has seen nothing: W₀, no momentum, no tail. At least float32, whatever the parameters are.

    Args:
      batch: leading axes before the heads that the parameters have, if any.
    """
    first = next(iter(params.weights.values()))
    lead, dtype = (*batch, *first.shape[:-2]), jnp.promote_types(first.dtype, jnp.float32)

    def copies() -> Weights:  # never one array twice: a state may be donated
        return {name: jnp.zeros((*batch, *w.shape), dtype) + w for name, w in params.weights.items()}

    empty = {
        name: jax.tree.map(lambda shape: jnp.zeros((*lead, *shape), dtype), shapes, is_leaf=_is_shape)
        for name, shapes in state_shapes(rule).items()
    }
    if rule.ns_per == "chunk":
        empty["pending"]["retention"] += 1.0
    if rule.optimizer != "exact":
        empty["weights"] = copies()
    if keeps_anchor(rule):
        empty["anchor"] = copies()
    return MemoryState(**empty, phase=np.zeros((), np.int32))  # type: ignore[arg-type]


def state_shapes(rule: MemoryRule) -> dict[str, Any]:
    """Shapes of a state's arrays after the axes of its batch, as `MemoryState` has them; `phase` has none."""
    matrices, exact = rule.weight_shapes, rule.optimizer == "exact"
    return {
        "weights": {} if exact else matrices,
        "anchor": matrices if keeps_anchor(rule) else {},
        "momentum": matrices if has_momentum(rule) else {},
        "tail_k": (rule.reach, rule.d_k),
        "tail_v": (rule.reach, rule.d_v),
        "tail_gate": (rule.reach,),
        "moments": {"keys": (rule.feature_dim,) * 2, "values": (rule.d_v, rule.feature_dim)} if exact else {},
        "pending": {"retention": (rule.gate_dim("alpha"),), "step": (_step_channels(rule),)}
        if rule.ns_per == "chunk"
        else {},
    }


def _is_shape(node: object) -> bool:
    return isinstance(node, tuple)


def has_momentum(rule: MemoryRule) -> bool:
    """Whether the state carries S."""
    return rule.uses("theta")


def keeps_anchor(rule: MemoryRule) -> bool:
    """Whether the anchor can differ from the weights."""
    return rule.anchored and rule.chunk > 1 and rule.ns_per == "token"


def _step_channels(rule: MemoryRule) -> int:
    return max(rule.gate_dim("alpha"), rule.gate_dim("eta"))
