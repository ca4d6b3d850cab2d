"""The residual blocks a pattern string names: how attention, memory and MLP are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from atlas_jax.memory import MemoryRule
from atlas_jax.model.lm.attention import Attention, window_mask
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.deep import DeepMemory
from atlas_jax.model.lm.layers import RMSNorm, SwiGLU, weight
from atlas_jax.model.lm.memory import make_memory
from atlas_jax.typing import Array, Float, Int32

Mixer = Callable[[Float[Array, "B T E"], Int32[Array, "B T"] | None], Float[Array, "B T E"]]


class Block(nnx.Module):
    """x + mixer(norm x), then + mlp(norm x): every kind of layer differs in its mixer only."""

    def __init__(self, config: LMConfig, mixer: nnx.Module, *, gain: float, rngs: nnx.Rngs) -> None:
        self.mixer_norm = RMSNorm(config.embed, eps=config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(config.embed, eps=config.norm_eps)
        self.mlp = SwiGLU(config.embed, config.ff, gain=gain, rngs=rngs)

    def __call__(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        mixer: Mixer = self.mixer
        return self.after(x, mixer(self.mixer_norm(x), document))

    def after(self, x: Float[Array, "B T E"], mixed: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The rest of the block once its mixer has mixed norm x."""
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


class MemoryAsGate(nnx.Module):
    """MAG: memory and sliding-window attention side by side.

    Both branches are normalised; `gate` multiplies attention by silu of the memory (Titans equation 28), `add` adds
    them (as ATLAS draws it).
    """

    def __init__(self, config: LMConfig, rules: tuple[MemoryRule, ...], *, gain: float, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, window=config.window, persistent=config.persistent, gain=1.0, rngs=rngs)
        self.memory = make_memory(config, rules, gain=1.0, rngs=rngs)
        self.attention_norm = RMSNorm(config.embed, eps=config.norm_eps)
        self.memory_norm = RMSNorm(config.embed, eps=config.norm_eps)
        self.out = weight(rngs, (config.embed, config.embed), "ef: e -> f", config.embed, gain=gain)
        self._gate = config.combine == "gate"

    def __call__(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        return self.combine(self.attention(x, document), self.memory(x, document))

    def combine(self, near: Float[Array, "B T E"], far: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Puts together what attention and memory made of the tokens."""
        near, far = self.attention_norm(near), self.memory_norm(far)
        mixed = near * jax.nn.silu(far) if self._gate else near + far
        return jnp.einsum("bte,ef->btf", mixed, self.out[...])


class MemoryAsContext(nnx.Module):
    """MAC: each segment attends to itself, to what the memory recalls for its tokens, and to persistent tokens.

    Titans section 4.1, made causal token by token: a token sees the recollections h_j of tokens j not after it; its own
    write precedes its final read.
    """

    def __init__(self, config: LMConfig, rules: tuple[MemoryRule, ...], *, gain: float, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, window=None, persistent=config.persistent, gain=1.0, rngs=rngs)
        self.memory = make_memory(config, rules, gain=1.0, rngs=rngs)
        self.recall_norm = RMSNorm(config.embed, eps=config.norm_eps)
        self.out = weight(rngs, (config.embed, config.embed), "ef: e -> f", config.embed, gain=gain)
        self._segment = config.segment

    def __call__(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        batch, tokens, embed = x.shape
        segments = -(-tokens // self._segment)
        x = jnp.pad(x, ((0, 0), (0, segments * self._segment - tokens), (0, 0)))
        runs = jnp.swapaxes(x.reshape(batch, segments, self._segment, embed), 0, 1)
        graph, params = nnx.split(self)
        new = self.memory.initial_state(batch)
        begins = None
        if document is not None:  # it begins with a segment, or nowhere: `LMConfig.document_step`
            first = document[:, :: self._segment]
            begins = (jnp.diff(first, axis=1, prepend=first[:, :1]) != 0).T

        def step(state: Any, run: tuple[jax.Array, jax.Array | None]) -> tuple[Any, jax.Array]:
            x, begin = run
            if begin is not None:
                state = jax.tree.map(
                    lambda a, b: jnp.where(begin.reshape(-1, *(1,) * (b.ndim - 1)), a, b) if b.ndim else b, new, state
                )
            return nnx.merge(graph, params)._segment_step(state, x)

        _, out = jax.lax.scan(step, new, (runs, begins))
        return jnp.swapaxes(out, 0, 1).reshape(batch, segments * self._segment, embed)[:, :tokens]

    def _segment_step(self, state: Any, x: Float[Array, "B S E"]) -> tuple[Any, Float[Array, "B S E"]]:
        memory: Any = self.memory
        recalled = self.recalled(memory.read(state, memory.queries(x)), x)
        both = jnp.concatenate([recalled, x], axis=1)
        causal = window_mask(x.shape[1], None)
        mask = jnp.concatenate([causal, causal], axis=1)
        attended = self.attention.project(self.attention.mix_masked(both, jnp.tile(mask, (2, 1))[None]))[
            :, x.shape[1] :
        ]
        state, read = memory.scan(state, memory.tokens(attended))
        return state, self.combine(attended, read)

    def recalled(self, read: Any, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """What stands before the tokens of a segment, from the memory's reads for them."""
        memory: Any = self.memory
        return self.recall_norm(memory.project(memory.gated(read, x)))

    def combine(self, attended: Float[Array, "B T E"], read: Any) -> Float[Array, "B T E"]:
        """Puts together what attention made of the tokens and what the memory, written with it, reads."""
        memory: Any = self.memory
        gate = jax.nn.silu(memory.project(memory.gated(read, attended)))
        return jnp.einsum("bte,ef->btf", attended * gate, self.out[...])


class MemoryAsLayer(nnx.Module):
    """MAL: memory → MLP → sliding-window attention → MLP, each with its residual (as ATLAS draws it; Samba's order)."""

    def __init__(self, config: LMConfig, rules: tuple[MemoryRule, ...], *, gain: float, rngs: nnx.Rngs) -> None:
        memory = make_memory(config, rules, gain=gain, rngs=rngs)
        attention = Attention(config, window=config.window, persistent=config.persistent, gain=gain, rngs=rngs)
        self.first = Block(config, memory, gain=gain, rngs=rngs)
        self.second = Block(config, attention, gain=gain, rngs=rngs)

    def __call__(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        return self.second(self.first(x, document), document)


def make_block(config: LMConfig, layer: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """The block of one letter of a pattern.

    Output projections start smaller by √(2 · layers), so that the residual stream keeps its size with depth.

    Raises:
      ValueError: the letter is not one of `config.LAYER_KINDS`.
    """
    kind, rules = config.pattern[layer], config.layer_rules[layer]
    gain = (2 * len(config.pattern)) ** -0.5
    mixer: nnx.Module
    match kind:
        case "L":
            return MemoryAsLayer(config, rules, gain=gain, rngs=rngs)
        case "A":
            mixer = Attention(config, window=None, gain=gain, rngs=rngs)
        case "S":
            mixer = Attention(config, window=config.window, gain=gain, rngs=rngs)
        case "M":
            mixer = make_memory(config, rules, gain=gain, rngs=rngs)
        case "C":
            mixer = MemoryAsContext(config, rules, gain=gain, rngs=rngs)
        case "G":
            mixer = MemoryAsGate(config, rules, gain=gain, rngs=rngs)
        case "D":
            mixer = DeepMemory(config, gain=gain, rngs=rngs)
        case _:
            raise ValueError(f"no layer kind {kind!r}")
    return Block(config, mixer, gain=gain, rngs=rngs)
