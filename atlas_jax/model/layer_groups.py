"""The transformer's layers as a few compiled programs instead of one.

XLA's compile time is mostly passes over the whole program: 30 unrolled layers take 11 s on two cores, five take 2 s, and
equal groups of layers share one program. Scanning over stacked layers would compile as fast but copies every weight on CPU.
Where the gaps between programs cost more than compiling, `Trunk.parts` gives the same numbers inlined into one program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.aot import INLINE, RUN, AotProgram, Mode
from atlas_jax.config import PAGE, LayerConfig, ModelConfig
from atlas_jax.kernels import lowering_platform
from atlas_jax.kernels.linear import rows_of
from atlas_jax.kernels.low_rank import LowRank, RowScales, add_low_rank
from atlas_jax.model.kv_cache import KVCache, first_pages, ring_view
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import GroupPairs, StepView, embed, run_layers, step_view

_PREFERRED = (5, 6, 4, 7, 3)
"""Layers per group on CPU, best first. More dispatch less; but streams wait for a group of a prompt's chunk, and ten layers
of SmolLM2-135M take several times as long as a decode step where a plain prompt has come to its 8 000th token."""


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that are one program.

    Attributes:
      first, last: index of the first layer, and of the one after the last.
    """

    first: int
    last: int


def layer_groups(layers: Sequence[LayerConfig], group: int) -> tuple[LayerGroup, ...]:
    """Cuts the layers into groups of `group`, the last one perhaps shorter."""
    return tuple(LayerGroup(first, min(first + group, len(layers))) for first in range(0, len(layers), group))


def preferred_group(layers: Sequence[LayerConfig]) -> int:
    """Layers per group so that as many groups as possible are equal."""
    count = len(layers)
    period = next(p for p in range(1, count + 1) if all(layers[i] == layers[i % p] for i in range(count)))
    sizes = [size for size in _PREFERRED if size % period == 0] or [period if period < 2 * max(_PREFERRED) else 5]
    return next((size for size in sizes if count % size == 0), min(sizes[0], count))


def _groups(layers: Sequence[LayerConfig]) -> tuple[LayerGroup, ...]:
    return layer_groups(layers, preferred_group(layers) if lowering_platform.platform() == "cpu" else len(layers))


class Trunk:
    """Everything between token ids and the last layer's output, as programs compiled per shape of a step.

    The key of a step is (rows, ring pages, tokens per row).
    """

    def __init__(self, config: ModelConfig, program: Callable[..., AotProgram] = AotProgram) -> None:
        """Compiles nothing yet.

        Args:
          program: makes a program of a function. On accelerators all layers are one: there the gaps between programs cost
            more than compiling.
        """
        self._layers = len(config.layers)
        groups = _groups(config.layers)
        self._enter = program(functools.partial(_enter, config, groups))
        self._adapt = program(functools.partial(_adapt, config))
        alike: dict[tuple[LayerConfig, ...], AotProgram] = {}
        self._groups: list[tuple[AotProgram, slice]] = []
        for group in groups:
            part = slice(group.first, group.last)
            specs = config.layers[part]
            if specs not in alike:
                alike[specs] = program(functools.partial(run_layers, config, specs), donate=(1,))
            self._groups.append((alike[specs], part))

    def __call__(
        self,
        key: Hashable,
        params: ModelParams,
        cache: KVCache,
        tokens: Any,
        count: Any,
        *,
        between: Callable[[jax.Array], object] = lambda outputs: None,
    ) -> tuple[KVCache, StepView, list[jax.Array]]:
        """Runs a step; the KV cache is donated. Arguments and results as for `parts`, of which this is the last.

        Args:
          between: is called after every group of layers with its outputs, perhaps before they are there.
        """
        for whole in self.parts(RUN, key, params, cache, tokens, count):
            between(whole[2][-1])
        return whole

    def parts(
        self, call: Mode, key: Hashable, params: ModelParams, cache: KVCache, tokens: Any, count: Any
    ) -> Iterator[tuple[KVCache, StepView, list[jax.Array]]]:
        """A step, one group of layers after the other.

        Args:
          call: how its programs are called. `INLINE` gives the same bits as `RUN`.
          cache: donated.
          tokens: [B, T], or [B] for one token per row, or several such arrays that follow one another; −1 is no token,
            nor is anything after it.
          count: how many tokens of each row are wanted. A row takes no more than its page has room for, and none if that
            page has not begun.

        Yields:
          The KV cache, the step's view, and the outputs of all layers so far. Before the last group the cache is where it
          was before the step: what layers have stored beyond that is not seen.
        """
        entered = call(self._enter, key, params.embed, params.ropes, page_table(cache), tokens, count)
        x, view, position, stretches = entered
        if cache.lora is not None:
            if call is INLINE:
                x, view = _edge(jnp.all(count >= 0), (x, view))
            x, rows = call(self._adapt, key, params.embed_lora, cache.lora, x, tokens, view.ring.valid)
            view = dataclasses.replace(view, lora=rows)
        states: list[jax.Array] = []
        kv = list(cache.kv)
        for (program, part), stretch in zip(self._groups, stretches, strict=True):
            if call is INLINE and self.programs > 1:
                x, view = _edge(jnp.all(count >= 0), (x, view))
            pairs = self._pairs(cache, part, stretch)
            outputs, kv[part] = call(program, key, params.layers[part], tuple(kv[part]), x, view, pairs)
            states += outputs
            x = outputs[-1]
            reached = position if part.stop == self._layers else cache.position
            yield dataclasses.replace(cache, kv=tuple(kv), position=reached), view, states

    def _pairs(self, cache: KVCache, part: slice, stretches: jax.Array) -> GroupPairs | None:
        """Kept pairs of a group. Where several share a program, all look at as many pages as the layer with the most."""
        if cache.pairs is None:
            return None
        pages, most = cache.kept_pages[part], max(cache.kept_pages)
        return GroupPairs(
            cache.pairs, stretches, tuple(most if one else 0 for one in pages) if self.programs > 1 else pages
        )

    @property
    def programs(self) -> int:
        """How many programs a step runs between its first and its last layer."""
        return len(self._groups)


def _edge(always: jax.Array, tree: Any) -> Any:
    """The tree, as an edge between programs leaves it: nothing is fused across it, which would round differently.

    XLA removes barriers before it fuses, but nothing from around a conditional whose outcome it cannot know.
    """
    return jax.lax.cond(always, lambda tree: tree, lambda tree: jax.tree.map(jnp.zeros_like, tree), tree)


def page_table(cache: KVCache) -> KVCache:
    """The cache without keys and values: positions and page table, which change outside the layers."""
    return dataclasses.replace(cache, kv=(), pairs=None, lora=None)


def _enter(
    config: ModelConfig,
    groups: Sequence[LayerGroup],
    table: Any,
    ropes: Any,
    cache: KVCache,
    tokens: Any,
    count: jax.Array,
) -> tuple[jax.Array, StepView, jax.Array, tuple[jax.Array, ...]]:
    batch = cache.position.shape[0]
    tokens = _in_a_row(tokens, batch)
    begun = cache.page[jnp.arange(batch), cache.slot] == cache.position // PAGE
    real = jnp.cumprod(tokens >= 0, axis=1).sum(axis=1)
    room = jnp.where(begun, PAGE - cache.position % PAGE, 0)
    count = jnp.minimum(count, jnp.minimum(real, room)).astype(jnp.int32)
    ring = ring_view(cache, tokens.shape[1], count)
    first = jnp.asarray(first_pages(cache.kept_pages or (0,) * len(config.layers)), jnp.int32)
    stretches = jnp.stack([jnp.broadcast_to(first, cache.kept.shape), cache.kept], axis=2)
    by_group = tuple(stretches[:, group.first : group.last] for group in groups)
    x = embed(config, table, jnp.maximum(tokens, 0))
    return x, step_view(config, ropes, ring), cache.position + count, by_group


def _in_a_row(tokens: Any, batch: int) -> jax.Array:
    """Tokens of a step, [B, T], of one array or several."""
    return jnp.concatenate([part.reshape(batch, -1) for part in jax.tree.leaves(tokens)], axis=1)


def _adapt(
    config: ModelConfig, lora: LowRank | None, scales: jax.Array, x: jax.Array, tokens: Any, valid: jax.Array
) -> tuple[jax.Array, RowScales]:
    """Embeddings with what LoRA adapters add to them, and how far rows use them.

    A program of its own: in the one before, XLA would fuse the rotations otherwise, and they would round otherwise than
    without adapters.
    """
    rows = RowScales(scales, (scales != 0).any(axis=1) & valid.any(axis=1))
    if lora is None:
        return x, rows
    tokens = jnp.maximum(_in_a_row(tokens, x.shape[0]), 0)
    return add_low_rank(x, lora, rows, lambda a: rows_of(a, tokens) * config.embed_scale), rows
