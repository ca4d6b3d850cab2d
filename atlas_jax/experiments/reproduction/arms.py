"""What is compared: sizes, and models of equal size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from atlas_jax.gguf import BYTE_VOCAB
from atlas_jax.memory import Features, MemoryRule, presets
from atlas_jax.model.lm import LMConfig, init_params

TOLERANCE = 0.01
"""How far the parameters of two compared models may be apart."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a comparison is.

    Attributes:
      dim: components of a memory's keys and values, per head.
      per_token: whether Muon orthogonalises the momentum of each token, as in the paper, or once per chunk.
      length, batch, steps: of training on text; `needle_steps` on needles, at `needle_length`.
      pairs, mqar_steps: of the recall of pairs.
    """

    name: str
    embed: int
    heads: int
    layers: int
    dim: int
    window: int
    chunk: int
    per_token: bool
    length: int
    batch: int
    steps: int
    needle_length: int
    needle_steps: int
    pairs: int
    mqar_steps: int

    @property
    def remat(self) -> bool:
        """Whether intermediates of chunks are computed again in the backward pass: where they are many."""
        return self.length > 128


SIZES = {
    size.name: size
    for size in (
        Size(
            name="tiny",
            embed=48,
            heads=2,
            layers=2,
            dim=12,
            window=16,
            chunk=16,
            per_token=False,
            length=128,
            batch=4,
            steps=400,
            needle_length=32,
            needle_steps=300,
            pairs=4,
            mqar_steps=300,
        ),
        Size(
            name="small",
            embed=256,
            heads=4,
            layers=4,
            dim=32,
            window=64,
            chunk=16,
            per_token=True,
            length=512,
            batch=16,
            steps=4000,
            needle_length=128,
            needle_steps=3000,
            pairs=8,
            mqar_steps=3000,
        ),
        Size(
            name="20m",
            embed=384,
            heads=6,
            layers=10,
            dim=64,
            window=128,
            chunk=16,
            per_token=True,
            length=1024,
            batch=32,
            steps=20000,
            needle_length=256,
            needle_steps=5000,
            pairs=16,
            mqar_steps=5000,
        ),
    )
}

Arm = Callable[[Size], LMConfig]
"""A contender before its size is matched."""


def base(size: Size, pattern: str, rule: MemoryRule | None = None) -> LMConfig:
    """A model whose every layer is of one kind."""
    return LMConfig(
        vocab=BYTE_VOCAB,
        embed=size.embed,
        ff=3 * size.embed,
        heads=size.heads,
        pattern=pattern * size.layers,
        window=size.window,
        segment=size.window,
        rule=rule,
        memory_heads=size.heads,
        gate_rank=4 if size.name == "tiny" else 16,
        context_length=16 * size.length,
    )


def gated_deltanet(size: Size) -> MemoryRule:
    """Gated DeltaNet's memory."""
    return presets.gated_deltanet(size.dim, size.dim, remat=size.remat)


def titans(size: Size) -> MemoryRule:
    """Titans' memory."""
    return presets.titans(size.dim, size.dim, chunk=size.chunk, hidden=2 * size.dim, remat=size.remat)


def omeganet(size: Size) -> MemoryRule:
    """OmegaNet's memory."""
    return presets.omeganet(size.dim, size.dim, chunk=size.chunk, hidden=2 * size.dim, remat=size.remat)


def atlas(size: Size, **changes: object) -> MemoryRule:
    """ATLAS' memory."""
    parts: dict[str, object] = {"chunk": size.chunk, "hidden": 2 * size.dim, "remat": size.remat}
    parts["ns_per"] = "token" if size.per_token else "chunk"
    return presets.atlas(size.dim, size.dim, **parts | changes)


MODELS: dict[str, Arm] = {
    "attention": lambda size: base(size, "A"),
    "sliding window": lambda size: base(size, "S"),
    "Gated DeltaNet": lambda size: base(size, "M", gated_deltanet(size)),
    "Titans": lambda size: base(size, "M", titans(size)),
    "OmegaNet": lambda size: base(size, "M", omeganet(size)),
    "ATLAS": lambda size: base(size, "M", atlas(size)),
    "ATLAS MAC": lambda size: base(size, "C", atlas(size)),
    "ATLAS MAG": lambda size: base(size, "G", atlas(size)),
    "ATLAS MAL": lambda size: base(size, "L", atlas(size)),
}
"""Contenders on text."""

_LINEAR = Features()

ABLATIONS: dict[str, Arm] = {
    "c = 1": lambda size: base(size, "M", atlas(size, window=1)),
    "c = 4": lambda size: base(size, "M", atlas(size, window=4)),
    "b = 4": lambda size: base(size, "M", atlas(size, chunk=4)),
    "degree 1": lambda size: base(size, "M", atlas(size, features=_LINEAR)),
    "momentum instead of Muon": lambda size: base(size, "M", atlas(size, optimizer="momentum", ns_per="token")),
    "matrix instead of MLP": lambda size: base(size, "M", atlas(size, memory="matrix", residual="none")),
}
"""ATLAS with one part changed."""

NEEDLES = ("attention", "sliding window", "Gated DeltaNet", "Titans", "ATLAS")
"""Models that are asked for needles."""


def count(config: LMConfig) -> int:
    """Trained numbers of a model; none is made."""
    return sum(int(x.size) for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(config, 0))))


def matched(size: Size, arm: Arm) -> LMConfig:
    """A contender with as many parameters as attention has, by the width of its MLPs.

    Raises:
      AssertionError: they cannot be brought within `TOLERANCE`.
    """
    wanted = count(MODELS["attention"](size))
    config = arm(size)
    one, two = count(config.replace(ff=1)), count(config.replace(ff=2))
    ff = max(1, round((wanted - one) / (two - one)) + 1)
    config = config.replace(ff=ff)
    found = count(config)
    assert abs(found - wanted) <= TOLERANCE * wanted, f"{found} parameters cannot be matched with {wanted}"
    return config
