"""The memory layer around a rule: projections, short convolutions, gates, and a gated, normalised output.

ATLAS figure 3: q, k, v each Linear → causal convolution → SiLU, then q and k to unit length (by the rule); every gate
is two linear maps and a squashing; the memory's output is normalised and multiplied by a gate of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from atlas_jax import memory
from atlas_jax.memory import MemoryRule, MemoryState, Params, Tokens
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.layers import RMSNorm, ShortConv, weight
from atlas_jax.typing import Array, Float, Int32

_OUTPUT_EPS = 1e-4
"""Of the norm on the memory's output: an untouched matrix memory reads exactly zero, where the slope of a norm is
1 / √eps; with the model's 1e-5 and less, the first tokens of a sequence dominate the gradient."""


QKV = ("q", "k", "v")
"""Names of what a memory layer projects and convolves."""


class Gates(nnx.Module):
    """η, α, θ and γ of every token, each from two linear maps of the token's vector.

    The second map starts at zero, so that every gate starts where `GateStart` says.
    """

    def __init__(self, config: LMConfig, rule: MemoryRule, heads: int, *, rngs: nnx.Rngs) -> None:
        start, rank = config.gate_start, config.gate_rank
        sizes = {name: rule.gate_dim(name) for name in ("eta", "alpha", "theta")} | {"gamma": rule.window_gates}
        down, up, bias = {}, {}, {}
        for name, size in sizes.items():
            if not rule.uses(name):
                continue
            share = float(getattr(start, name))
            down[name] = weight(rngs, (config.embed, rank), "er: e -> r", config.embed)
            up[name] = nnx.Param(jnp.zeros((rank, heads, size), jnp.float32), matrix="rhg: r -> hg")
            bias[name] = nnx.Param(jnp.full((heads, size), math.log(share / (1 - share)), jnp.float32))
        self.down, self.up, self.bias = nnx.Dict(down), nnx.Dict(up), nnx.Dict(bias)
        self._sizes, self._eta_max, self._heads = sizes, config.eta_max(rule), heads

    def __call__(self, x: Float[Array, "B T E"]) -> dict[str, Float[Array, "B H T gates"]]:
        """Gates by name; those the rule does not use are constant."""
        found = {}
        for name, size in self._sizes.items():
            if name not in self.bias:
                constant = 0.0 if name == "theta" else 1.0
                found[name] = jnp.full((x.shape[0], self._heads, x.shape[1], size), constant, x.dtype)
                continue
            narrow = jnp.einsum("bte,er->btr", x, self.down[name][...])
            logit = jnp.einsum("btr,rhg->bhtg", narrow, self.up[name][...]) + self.bias[name][...][:, None]
            squashed = jax.nn.sigmoid(logit)
            found[name] = squashed * self._eta_max if name == "eta" else squashed
        return found


class MemoryLayer(nnx.Module):
    """A memory per head, written and read token by token, all by one rule."""

    def __init__(self, config: LMConfig, rule: MemoryRule, heads: int, *, gain: float = 1.0, rngs: nnx.Rngs) -> None:
        embed = config.embed
        self._every = config.document_step
        self.rule: MemoryRule = nnx.static(rule)
        self.q = weight(rngs, (embed, heads, rule.d_k), "ehd: e -> hd", embed)
        self.k = weight(rngs, (embed, heads, rule.d_k), "ehd: e -> hd", embed)
        self.v = weight(rngs, (embed, heads, rule.d_v), "ehd: e -> hd", embed)
        self.q_conv = ShortConv((heads, rule.d_k), config.conv, rngs=rngs)
        self.k_conv = ShortConv((heads, rule.d_k), config.conv, rngs=rngs)
        self.v_conv = ShortConv((heads, rule.d_v), config.conv, rngs=rngs)
        self.gates = Gates(config, rule, heads, rngs=rngs)
        start = memory.init_params(rule, rngs.params(), (heads,))
        self.start = nnx.Dict({name: nnx.Param(x, matrix="hoi: i -> o") for name, x in start.weights.items()})
        self.features = nnx.Dict({name: nnx.Param(x) for name, x in start.features.items()})
        self.norm = RMSNorm(heads, rule.d_v, eps=_OUTPUT_EPS)
        self.output_gate = weight(rngs, (embed, heads, rule.d_v), "ehd: e -> hd", embed)
        self.out = weight(rngs, (heads, rule.d_v, embed), "hde: hd -> e", heads * rule.d_v, gain=gain)

    def __call__(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        return self.project(self.mix(x, document))

    def mix(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T H d_v"]:
        """Normalised, gated reads of a memory that starts anew with each document; before the output projection."""
        starts = None
        if document is not None:
            starts = jnp.diff(document, axis=1, prepend=document[:, :1]) != 0
            starts = jnp.broadcast_to(starts[:, None], (x.shape[0], self.q.shape[1], x.shape[1]))
        read = memory.chunked(
            self.rule,
            self.params(),
            self.initial_state(x.shape[0]),
            self.tokens(x, document),
            starts=starts,
            every=self._every,
        )[1]
        return self.gated(read, x)

    def gated(self, read: Float[Array, "B H T d_v"], x: Float[Array, "B T E"]) -> Float[Array, "B T H d_v"]:
        """Norm(read) ⊙ silu(gate(x))."""
        gate = jax.nn.silu(jnp.einsum("bte,ehd->bthd", x, self.output_gate[...]))
        return self.norm(jnp.swapaxes(read, 1, 2)) * gate

    def project(self, mixed: Float[Array, "B T H d_v"]) -> Float[Array, "B T E"]:
        """The output projection."""
        return jnp.einsum("bthd,hde->bte", mixed.astype(self.out[...].dtype), self.out[...])

    def tokens(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Tokens:
        """What the memory is fed."""
        found = {name: self.convolved(name, self.projected(name, x), document=document) for name in QKV}
        return Tokens(**found, **self.gates(x))

    def queries(self, x: Float[Array, "B T E"]) -> Float[Array, "B H T d_k"]:
        """What the memory is asked."""
        return self.convolved("q", self.projected("q", x))

    def projected(self, name: str, x: Float[Array, "B T E"]) -> Float[Array, "B T H d"]:
        """Queries, keys or values (one of `QKV`) before their convolution."""
        projection: nnx.Param[jax.Array] = getattr(self, name)
        return jnp.einsum("bte,ehd->bthd", x, projection[...])

    def convolved(
        self,
        name: str,
        y: Float[Array, "B T H d"],
        before: Float[Array, "B taps-1 H d"] | None = None,
        document: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B H T d"]:
        """What the memory is fed of projections.

        Args:
          name: one of `QKV`.
          before: projections of the tokens before; nothing, that is zeros, if not given.
          document: as for `ShortConv`.
        """
        conv: ShortConv = getattr(self, f"{name}_conv")
        return jnp.swapaxes(jax.nn.silu(conv(y, before, document)), 1, 2)

    def params(self) -> Params:
        """The rule's own parameters: initial memory and feature map."""
        return Params(
            {name: x[...] for name, x in self.start.items()}, {name: x[...] for name, x in self.features.items()}
        )

    def initial_state(self, batch: int) -> MemoryState:
        """The learned memory that every sequence starts from."""
        return memory.init_state(self.rule, self.params(), (batch,))

    def scan(self, state: MemoryState, tokens: Tokens) -> tuple[MemoryState, Float[Array, "B H T d_v"]]:
        """Writes a run of tokens; outputs are read after each token's own write."""
        return memory.chunked(self.rule, self.params(), state, tokens)

    def read(self, state: MemoryState, q: Float[Array, "B H T d_k"]) -> Float[Array, "B H T d_v"]:
        """Reads without writing."""
        return memory.read(self.rule, self.params(), state, q)


class MixedMemory(nnx.Module):
    """Memories of several rules side by side, each with an equal share of a layer's heads; their outputs are added."""

    def __init__(self, config: LMConfig, rules: tuple[MemoryRule, ...], *, gain: float, rngs: nnx.Rngs) -> None:
        heads = config.memory_heads // len(rules)
        scaled = gain * len(rules) ** -0.5  # as one projection from all heads would have it
        self.groups = nnx.List([MemoryLayer(config, rule, heads, gain=scaled, rngs=rngs) for rule in rules])

    def __call__(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        return self._sum(group(x, document) for group in self.groups)

    def gated(self, read: tuple[jax.Array, ...], x: Float[Array, "B T E"]) -> tuple[jax.Array, ...]:
        """`MemoryLayer.gated` of each group."""
        return tuple(group.gated(one, x) for group, one in zip(self.groups, read, strict=True))

    def project(self, mixed: tuple[jax.Array, ...]) -> Float[Array, "B T E"]:
        """Sum of the output projections."""
        return self._sum(group.project(one) for group, one in zip(self.groups, mixed, strict=True))

    def tokens(self, x: Float[Array, "B T E"]) -> tuple[Tokens, ...]:
        """What each memory is fed."""
        return tuple(group.tokens(x) for group in self.groups)

    def queries(self, x: Float[Array, "B T E"]) -> tuple[jax.Array, ...]:
        """What each memory is asked."""
        return tuple(group.queries(x) for group in self.groups)

    def initial_state(self, batch: int) -> tuple[MemoryState, ...]:
        """The learned memories that every sequence starts from."""
        return tuple(group.initial_state(batch) for group in self.groups)

    def scan(
        self, state: tuple[MemoryState, ...], tokens: tuple[Tokens, ...]
    ) -> tuple[tuple[MemoryState, ...], tuple[jax.Array, ...]]:
        """`MemoryLayer.scan` of each group."""
        both = [group.scan(s, t) for group, s, t in zip(self.groups, state, tokens, strict=True)]
        return tuple(s for s, _ in both), tuple(y for _, y in both)

    def read(self, state: tuple[MemoryState, ...], q: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Reads without writing."""
        return tuple(group.read(s, x) for group, s, x in zip(self.groups, state, q, strict=True))

    @staticmethod
    def _sum(parts: Iterable[jax.Array]) -> jax.Array:
        first, *rest = parts
        return sum(rest, start=first)


Memory = MemoryLayer | MixedMemory


def make_memory(config: LMConfig, rules: tuple[MemoryRule, ...], *, gain: float, rngs: nnx.Rngs) -> Memory:
    """The memory of one layer of a model."""
    if len(rules) == 1:
        return MemoryLayer(config, rules[0], config.memory_heads, gain=gain, rngs=rngs)
    return MixedMemory(config, rules, gain=gain, rngs=rngs)


def groups(layer: Memory) -> tuple[MemoryLayer, ...]:
    """The memories of a layer, one per rule."""
    return tuple(layer.groups) if isinstance(layer, MixedMemory) else (layer,)
