"""Named memories. Each is a configuration and nothing else; any field can be overridden.

Equations and sections that name no other paper are those of ATLAS (arXiv 2505.23735).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atlas_jax.kernels.feature_maps import monomial_count
from atlas_jax.memory._rule import Features, MemoryRule

_CLIP = 100.0
"""Keeps an MLP finite whatever it is fed; gradients of values of norm below about 10 never reach it."""


def atlas(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """ATLAS: an MLP on polynomial features, Omega window, Muon per token (equations 32 and 33).

    The paper gives neither degree nor width of φ: degree 2, sketched to 4·d_k features where there are more. Written once
    under Omega, 128 pairs of 64 components are read with error 0.475 ± 0.009 from a sketch and 0.561 ± 0.008 from a random
    projection, of 20 times the cost (docs/experiments.md); `Features(compress="projection")` has one that is learned.

    Gradients are taken at the newest memory: 16 pairs of 16 components are read with error 0.21 ± 0.05, 0.64 ± 0.14 with
    chunks of 4 and 1.17 ± 0.25 with chunks of 16 (8 seeds, best of 12 steps). Larger chunks learn less, faster.
    """
    return _deep(d_k, d_v, overrides, features=_polynomial(d_k), window=16, chunk=1, optimizer="muon")


def atlas_pp(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """Atlas++: `atlas` with a gated MLP (equation 43)."""
    return atlas(d_k, d_v, **{"memory": "gated_mlp"} | overrides)


def omeganet(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """OmegaNet: `atlas` with plain gradient descent (equation 10)."""
    return atlas(d_k, d_v, **{"optimizer": "gradient"} | overrides)


def titans(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """Titans' long-term memory: an MLP, one token at a time, momentum and forgetting (arXiv 2501.00663, eq. 13, 14).

    Its retention 1 − α is α here, its momentum η is θ, its step θ is η; its loss gives the same factor 2.
    """
    return _deep(d_k, d_v, overrides, optimizer="momentum", step="inside")


def deltanet(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """DeltaNet (arXiv 2406.06484): W_t = W_{t−1}(I − βkkᵀ) + βvkᵀ with β = 2η."""
    return _rule(d_k, d_v, overrides, chunk=1, retention="none")


def gated_deltanet(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """Gated DeltaNet (arXiv 2412.06464): W_t = α_t W_{t−1}(I − βkkᵀ) + βvkᵀ with β = 2η."""
    return _rule(d_k, d_v, overrides, chunk=1, gradient_at="decayed")


def ttt_mlp(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """TTT-MLP (arXiv 2407.04620): gradient descent on an MLP, batches of 16 tokens, no forgetting, no inner norm."""
    return _deep(d_k, d_v, overrides, chunk=16, retention="none")


def dla(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """Deep linear attention (ATLAS section 4.1): an MLP that maximises ⟨M(k), v⟩."""
    return _deep(d_k, d_v, overrides, objective="dot")


def swla(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """Sliding window linear attention (ATLAS section 4): every step adds the last c outer products."""
    return _rule(d_k, d_v, overrides, objective="dot", window=16, chunk=64)


def linear_attention(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """Linear attention (arXiv 2006.16236), unnormalised: W_t = W_{t−1} + η v φ(k)ᵀ. With φ*, softmax attention's sums."""
    return _rule(d_k, d_v, overrides, objective="dot", chunk=64, retention="none")


def mesa(d_k: int, d_v: int, **overrides: Any) -> MemoryRule:
    """Mesa layer: the ridge regression of all tokens so far, exactly (arXiv 2309.05858)."""
    return _rule(d_k, d_v, overrides, window=None, optimizer="exact", block=32)


PRESETS: dict[str, Callable[..., MemoryRule]] = {
    preset.__name__: preset
    for preset in (
        atlas,
        atlas_pp,
        omeganet,
        titans,
        deltanet,
        gated_deltanet,
        ttt_mlp,
        dla,
        swla,
        linear_attention,
        mesa,
    )
}
"""All presets by name."""


def _rule(d_k: int, d_v: int, overrides: dict[str, Any], **fields: Any) -> MemoryRule:
    return MemoryRule(**{"d_k": d_k, "d_v": d_v} | fields | overrides)


def _deep(d_k: int, d_v: int, overrides: dict[str, Any], **fields: Any) -> MemoryRule:
    residual = "key" if d_k == d_v else "none"
    return _rule(d_k, d_v, overrides, **{"memory": "mlp", "residual": residual, "clip": _CLIP} | fields)


def _polynomial(d_k: int) -> Features:
    width = 4 * d_k
    if monomial_count(d_k, 2) <= width:
        return Features(kind="polynomial", degree=2)
    return Features(kind="polynomial", degree=2, compress="sketch", width=width)
