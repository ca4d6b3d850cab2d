"""The transformer's layers as a few compiled programs instead of one.

XLA's compile time is mostly passes over the whole program: 30 unrolled layers take 11 s on two cores, five take 2 s, and
equal groups of layers share one program. Scanning over stacked layers would compile as fast but copies every weight on CPU.
`trunk` is for where the gaps between programs cost more than compiling: the same numbers from one program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.aot import AotProgram, shapes
from atlas_jax.config import PAGE, LayerConfig, ModelConfig
from atlas_jax.kernels import lowering_platform
from atlas_jax.model.kv_cache import KVCache, ring_view
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import StepView, embed, run_layers, step_view
from atlas_jax.sharding import ONE_DEVICE, MeshLayout

_PREFERRED = (5, 6, 4, 7, 3)
"""Layers per group on CPU, best first. More dispatch less; but streams wait for a group of a prompt's piece, and ten layers
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
    """Everything between token ids and the last layer's output, compiled per shape of a step.

    The key of a step is (rows, ring pages, tokens per row).
    """

    def __init__(self, config: ModelConfig, mesh_layout: MeshLayout = ONE_DEVICE) -> None:
        """On accelerators all layers are one program: there the gaps between programs cost more than compiling."""
        self._config = config
        self._groups = _groups(config.layers)
        self._enter = AotProgram(functools.partial(_enter, config), mesh_layout=mesh_layout)
        self._run: dict[tuple[LayerConfig, ...], AotProgram] = {}
        for group in self._groups:
            specs = config.layers[group.first : group.last]
            run = functools.partial(run_layers, config, specs)
            self._run.setdefault(specs, AotProgram(run, donate=(1,), mesh_layout=mesh_layout))

    def __call__(
        self, key: Hashable, params: ModelParams, cache: KVCache, tokens: Any, count: Any
    ) -> tuple[KVCache, StepView, list[jax.Array]]:
        """Runs a step; the KV cache is donated.

        Args:
          tokens: [B, T], or [B] for one token per row, or several such arrays that follow one another; −1 is no token,
            nor is anything after it.
          count: how many tokens of each row are wanted. A row takes no more than its page has room for, and none if that
            page has not begun.

        Returns:
          The KV cache after the step, the step's view, and every layer's output.
        """
        *_, whole = self.parts(key, params, cache, tokens, count)
        return whole

    def parts(
        self, key: Hashable, params: ModelParams, cache: KVCache, tokens: Any, count: Any
    ) -> Iterator[tuple[KVCache, StepView, list[jax.Array]]]:
        """The same a group of layers at a time, with the outputs so far.

        Before the last group the cache is where it was before the step: what layers have stored beyond that is not seen.
        """
        x, view, position = self._enter(key, params.embed, params.ropes, page_table(cache), tokens, count)
        states: list[jax.Array] = []
        kv = list(cache.kv)
        for group in self._groups:
            program = self._run[self._config.layers[group.first : group.last]]
            part = slice(group.first, group.last)
            outputs, kv[part] = program(key, params.layers[part], tuple(kv[part]), x, view)
            states += outputs
            x = outputs[-1]
            reached = position if group is self._groups[-1] else cache.position
            yield dataclasses.replace(cache, kv=tuple(kv), position=reached), view, states

    @property
    def programs(self) -> int:
        """How many programs a step runs between its first and its last layer."""
        return len(self._groups)

    def compile(
        self, key: Hashable, params: ModelParams, cache: KVCache, tokens: Any, count: Any
    ) -> tuple[StepView, list[Any]]:
        """Compiles a step from shapes; returns the shapes of its view and of the layers' outputs."""
        enter = (params.embed, params.ropes, page_table(cache), tokens, count)
        self._enter.compile(key, *enter)
        x, view, _ = jax.eval_shape(functools.partial(_enter, self._config), *enter)
        for group in self._groups:
            part = slice(group.first, group.last)
            self._run[self._config.layers[part]].compile(key, params.layers[part], cache.kv[part], x, view)
        return view, [shapes(x)] * len(self._config.layers)


def trunk(
    config: ModelConfig, params: ModelParams, cache: KVCache, tokens: Any, count: Any
) -> tuple[KVCache, StepView, tuple[jax.Array, ...]]:
    """What `Trunk` does, bit for bit, as one function to be compiled into its caller's program."""
    x, view, position = _enter(config, params.embed, params.ropes, page_table(cache), tokens, count)
    states: list[jax.Array] = []
    kv: list[Any] = []
    parts = _groups(config.layers)
    for group in parts:
        if len(parts) > 1:
            x, view = _edge(jnp.all(count >= 0), (x, view))
        part = slice(group.first, group.last)
        outputs, stored = run_layers(config, config.layers[part], params.layers[part], cache.kv[part], x, view)
        states += outputs
        kv += stored
        x = outputs[-1]
    return dataclasses.replace(cache, kv=tuple(kv), position=position), view, tuple(states)


def _edge(always: jax.Array, tree: Any) -> Any:
    """The tree, as an edge between programs leaves it: nothing is fused across, where it would round differently.

    XLA removes barriers before it fuses, but nothing from around a conditional whose outcome it cannot know.
    """
    return jax.lax.cond(always, lambda tree: tree, lambda tree: jax.tree.map(jnp.zeros_like, tree), tree)


def page_table(cache: KVCache) -> KVCache:
    """The cache without keys and values: positions and page table, which change outside the layers."""
    return dataclasses.replace(cache, kv=())


def _enter(
    config: ModelConfig, table: Any, ropes: Any, cache: KVCache, tokens: Any, count: jax.Array
) -> tuple[jax.Array, StepView, jax.Array]:
    rows = jnp.arange(cache.position.shape[0])
    tokens = jnp.concatenate([part.reshape(rows.size, -1) for part in jax.tree.leaves(tokens)], axis=1)
    begun = cache.page[rows, cache.slot] == cache.position // PAGE
    real = jnp.cumprod(tokens >= 0, axis=1).sum(axis=1)
    room = jnp.where(begun, PAGE - cache.position % PAGE, 0)
    count = jnp.minimum(count, jnp.minimum(real, room)).astype(jnp.int32)
    ring = ring_view(cache, tokens.shape[1], count)
    return embed(config, table, jnp.maximum(tokens, 0)), step_view(config, ropes, ring), cache.position + count
