"""What a memory needs to know of a model: key map, features, value codes, gate. Made by calibration, shared by sessions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import MAX_DEGREE, MemoryConfig
from atlas_jax.kernels.linear import QuantArray
from atlas_jax.kernels.monomials import MonomialTable, feature_count, monomial_table
from atlas_jax.typing import Array, Float, Int32

GATE_FEATURES = 4
CONTEXT_DECAY = 0.9
CONTEXT_LENGTH = 32
"""The words before a token are in its context with weights 1, 0.9, 0.9², … 0.9³¹, times each token's own."""
AGREED_DECAY = 0.75
AGREED_LENGTH = 16
"""How far the memory has been right of late is a decaying mean over so many tokens."""
_CODE_SEED = 0x41544C4153


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """Arrays the compiled step reads.

    Attributes:
      mean, projection: the key map of each tapped layer, z = (h − mean)·projection. Projections are arrays of their own:
        XLA's CPU backend copies each slice of a common one in every step, 1.2 ms for ten layers of SmolLM2-135M.
      token_weight: [V], 0 … 1, how much a token says about what is being talked of; see `token_weights`.
      select: for each number of layers in use and each degree, which of the layers' concatenated z make up a key's half
        (the last index: none, a zero).
      factors, feature_weight: monomials of each degree over a key's components (see `MonomialTable`).
      codes: [V, C], ±1/√C; token v's value code is row v.
      gate, cue: the gate's weights of `recall_memory.gate_features`, and of `recall_state.Answer.cues`.
    """

    mean: Float[Array, "A E"]
    projection: tuple[Float[Array, "E Z"], ...]
    token_weight: Float[Array, V]
    select: Int32[Array, "A degree Z"]
    factors: Int32[Array, "degree M 3"]
    feature_weight: Float[Array, "degree M"]
    codes: QuantArray
    gate: Float[Array, features]
    cue: Float[Array, cues]

    @property
    def halves(self) -> tuple[int, ...]:
        """Components of a key's half at each degree."""
        degrees, features, _ = self.factors.shape
        return tuple(_half(self.select.shape[2], features, degree) for degree in range(1, degrees + 1))


def key_components(config: MemoryConfig, degree: int) -> int:
    """Components of a key's half at a degree: as many as the features allow, for the memory's size is the same at all."""
    return _half(config.components, config.features, degree)


def _half(components: int, features: int, degree: int) -> int:
    dim = components
    while dim > 1 and _feature_count(dim, degree) > features:
        dim -= 1
    return dim


def make_adapter(
    config: MemoryConfig,
    vocab: int,
    mean: np.ndarray,
    projection: np.ndarray,
    token_weight: np.ndarray,
    gate: np.ndarray,
    cue: np.ndarray,
) -> Adapter:
    """Completes the calibrated numbers with the tables that follow from the configuration.

    Args:
      mean: float32 [A, E].
      projection: float32 [A, E, Z].
      token_weight: float32 [vocab].
      gate: float32 [GATE_FEATURES].
      cue: float32 [Z + 1].
    """
    layers, _, components = projection.shape
    select = np.full((layers, MAX_DEGREE, components), layers * components, np.int32)
    factors = np.full((MAX_DEGREE, config.features, MAX_DEGREE), config.key_size, np.int32)
    weight = np.zeros((MAX_DEGREE, config.features), np.float32)
    for degree in range(1, MAX_DEGREE + 1):
        dim = key_components(config, degree)
        table = _monomials(dim, components, degree)
        count = len(table.weight)
        factors[degree - 1, :count, : table.factors.shape[1]] = table.factors
        weight[degree - 1, :count] = table.weight
        for used in range(1, layers + 1):
            # the leading components of every layer in use, as even a share as goes
            chosen = [layer * components + np.arange(share) for layer, share in enumerate(_shares(dim, used))]
            select[used - 1, degree - 1, :dim] = np.concatenate(chosen)
    return Adapter(
        mean=jnp.asarray(mean, jnp.float32),
        projection=tuple(jnp.asarray(layer, jnp.float32) for layer in projection),
        token_weight=jnp.asarray(token_weight, jnp.float32),
        select=jnp.asarray(select),
        factors=jnp.asarray(factors),
        feature_weight=jnp.asarray(weight),
        codes=QuantArray(
            jnp.asarray(value_codes(vocab, config.code_dim)),
            jnp.full((vocab,), config.code_dim**-0.5, jnp.float32),
        ),
        gate=jnp.asarray(gate, jnp.float32),
        cue=jnp.asarray(cue, jnp.float32),
    )


def value_codes(vocab: int, dim: int) -> np.ndarray:
    """Random signs, the same everywhere: int8 [vocab, dim]. Token embeddings are not orthogonal enough to be codes."""
    bits = np.random.Generator(np.random.PCG64(_CODE_SEED)).bytes((vocab * dim + 7) // 8)
    signs = np.unpackbits(np.frombuffer(bits, np.uint8))[: vocab * dim]
    return (signs.astype(np.int8) * 2 - 1).reshape(vocab, dim)


def token_weights(vocab: int, texts: Iterable[Sequence[int] | np.ndarray], markup: Collection[int] = ()) -> np.ndarray:
    """How much each token says about what is being talked of: (ln p / ln p₀)³ of its share p in some text, float32 [vocab].

    p₀ is the share of a token that does not occur. A few thousand tokens are enough to tell "the" and "of", which are at
    0.1, from names, which are at 1.

    Args:
      markup: tokens that say nothing, as those that begin and end a message.
    """
    count = np.full(vocab, 0.5)
    for text in texts:
        count += np.bincount(np.asarray(text, np.int64), minlength=vocab)
    share = np.log(count / count.sum())
    weight = (share / share.min()) ** 3
    weight[list(markup)] = 0.0
    return weight.astype(np.float32)


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _monomials(dim: int, components: int, degree: int) -> MonomialTable:
    """The monomials of `recall_memory.kernel` in keys whose halves use their first `dim` of `components` numbers."""
    if degree == 1:
        index = np.concatenate([np.arange(dim), components + np.arange(dim)]).astype(np.int32)
        return MonomialTable(index[:, None], np.full(2 * dim, math.sqrt(0.5), np.float32))
    states = monomial_table(dim, _homogeneous(degree - 1))
    context = np.tile(components + np.arange(dim, dtype=np.int32), len(states.weight))
    factors = np.concatenate([np.repeat(states.factors, dim, axis=0), context[:, None]], axis=1)
    return MonomialTable(factors, np.repeat(states.weight, dim))


def _feature_count(dim: int, degree: int) -> int:
    return 2 * dim if degree == 1 else dim * feature_count(dim, _homogeneous(degree - 1))


def _homogeneous(degree: int) -> tuple[float, ...]:
    """Kernel (x·y)^degree. Keys have unit norm, so lower degrees are in the span already (|x|² = 1) or wash out."""
    return (0.0,) * degree + (1.0,)
