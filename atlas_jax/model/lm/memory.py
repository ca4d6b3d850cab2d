"""The memory layer around a rule: projections, short convolutions, gates, and a gated, normalised output.

ATLAS figure 3: q, k, v each Linear → causal convolution → SiLU, then q and k to unit length (by the rule); every gate
is two linear maps and a squashing; the memory's output is normalised and multiplied by a gate of the input.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from atlas_jax import memory
from atlas_jax.memory import MemoryRule, MemoryState, Params, Tokens
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.layers import RMSNorm, ShortConv, weight
from atlas_jax.typing import Array, Float

_OUTPUT_EPS = 1e-4
"""Of the norm on the memory's output: an untouched matrix memory reads exactly zero, where the slope of a norm is
1 / √eps; with the model's 1e-5 and less, the first tokens of a sequence dominate the gradient."""


QKV = ("q", "k", "v")
"""Names of what a memory layer projects and convolves."""


class Gates(nnx.Module):
    """η, α, θ and γ of every token, each from two linear maps of the token's vector.

    The second map starts at zero, so that every gate starts where `GateStart` says.
    """

    def __init__(self, config: LMConfig, rule: MemoryRule, *, rngs: nnx.Rngs) -> None:
        start, heads, rank = config.gate_start, config.memory_heads, config.gate_rank
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
        self._sizes, self._eta_max, self._heads = sizes, config.eta_max, heads

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
    """A memory per head, written and read token by token.

    Raises:
      ValueError: the configuration has no rule.
    """

    def __init__(self, config: LMConfig, *, gain: float = 1.0, rngs: nnx.Rngs) -> None:
        if config.rule is None:
            raise ValueError("a memory layer needs a rule")
        rule, embed, heads = config.rule, config.embed, config.memory_heads
        self.rule: MemoryRule = nnx.static(rule)
        self.q = weight(rngs, (embed, heads, rule.d_k), "ehd: e -> hd", embed)
        self.k = weight(rngs, (embed, heads, rule.d_k), "ehd: e -> hd", embed)
        self.v = weight(rngs, (embed, heads, rule.d_v), "ehd: e -> hd", embed)
        self.q_conv = ShortConv((heads, rule.d_k), config.conv, rngs=rngs)
        self.k_conv = ShortConv((heads, rule.d_k), config.conv, rngs=rngs)
        self.v_conv = ShortConv((heads, rule.d_v), config.conv, rngs=rngs)
        self.gates = Gates(config, rule, rngs=rngs)
        start = memory.init_params(rule, rngs.params(), (heads,))
        self.start = nnx.Dict({name: nnx.Param(x, matrix="hoi: i -> o") for name, x in start.weights.items()})
        self.features = nnx.Dict({name: nnx.Param(x) for name, x in start.features.items()})
        self.norm = RMSNorm(heads, rule.d_v, eps=_OUTPUT_EPS)
        self.output_gate = weight(rngs, (embed, heads, rule.d_v), "ehd: e -> hd", embed)
        self.out = weight(rngs, (heads, rule.d_v, embed), "hde: hd -> e", heads * rule.d_v, gain=gain)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        return self.project(self.mix(x))

    def mix(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H d_v"]:
        """Normalised, gated reads of a memory that starts anew with each sequence; before the output projection."""
        _, read = self.scan(self.initial_state(x.shape[0]), self.tokens(x))
        return self.gated(read, x)

    def gated(self, read: Float[Array, "B H T d_v"], x: Float[Array, "B T E"]) -> Float[Array, "B T H d_v"]:
        """Norm(read) ⊙ silu(gate(x))."""
        gate = jax.nn.silu(jnp.einsum("bte,ehd->bthd", x, self.output_gate[...]))
        return self.norm(jnp.swapaxes(read, 1, 2)) * gate

    def project(self, mixed: Float[Array, "B T H d_v"]) -> Float[Array, "B T E"]:
        """The output projection."""
        return jnp.einsum("bthd,hde->bte", mixed, self.out[...])

    def tokens(self, x: Float[Array, "B T E"]) -> Tokens:
        """What the memory is fed."""
        return Tokens(**{name: self.convolved(name, self.projected(name, x)) for name in QKV}, **self.gates(x))

    def projected(self, name: str, x: Float[Array, "B T E"]) -> Float[Array, "B T H d"]:
        """Queries, keys or values (one of `QKV`) before their convolution."""
        projection: nnx.Param[jax.Array] = getattr(self, name)
        return jnp.einsum("bte,ehd->bthd", x, projection[...])

    def convolved(
        self, name: str, y: Float[Array, "B T H d"], before: Float[Array, "B taps-1 H d"] | None = None
    ) -> Float[Array, "B H T d"]:
        """What the memory is fed of projections.

        Args:
          name: one of `QKV`.
          before: projections of the tokens before; nothing, that is zeros, if not given.
        """
        conv: ShortConv = getattr(self, f"{name}_conv")
        return jnp.swapaxes(jax.nn.silu(conv(y, before)), 1, 2)

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
