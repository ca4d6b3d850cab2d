"""Language models read piece by piece, against their training form on the whole text.

In float64, rotations included, so that a wrong edge of a mask or tap of a convolution is far from rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import RopeConfig
from atlas_jax.kernels.rope import RopeTable, frequencies, rope_table
from atlas_jax.memory import PRESETS
from atlas_jax.model.lm import (
    MAX_CHUNK,
    GateStart,
    LMConfig,
    LMParams,
    LMState,
    bounded,
    create,
    extend,
    init_state,
    logits,
    split,
    streaming,
)
from tests.property.memory_support import close, jit, preset

FEW = settings(max_examples=1, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31 - 1)
ROWS = 3
PER_CHUNK = preset("deltanet", optimizer="muon", ns_per="chunk", retention="decay", chunk=4, remat=False)
BASE = LMConfig(
    vocab=7,
    embed=8,
    ff=8,
    heads=4,
    kv_heads=2,
    head_dim=4,
    pattern="S",
    window=5,
    segment=6,
    persistent=2,
    rule=preset("linear_attention", remat=False),
    memory_heads=2,
    gate_rank=2,
    gate_start=GateStart(eta_max=0.1),
    conv=3,
    dot_hidden=3,
)
SHORT, LONG = 23, BASE.window + MAX_CHUNK + 41
"""Texts for layers without a ring, and for those with one, which turns."""


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Iterator[None]:
    """float64 all through: the table of rotations is the one thing that is float32 whatever the parameters are."""

    def table(config: RopeConfig) -> RopeTable:
        angle = np.arange(1024)[:, None] * 1024.0 ** np.arange(3)[:, None, None] * frequencies(config)
        return RopeTable(jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle)))

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "rope_table", table)
        yield


def cases() -> dict[str, tuple[LMConfig, int, tuple[int, ...]]]:
    """Models, each with a length of text and the sizes of pieces."""
    windows = {
        "S": BASE.replace(pattern="SS"),
        "L": BASE.replace(pattern="L"),
        "G": BASE.replace(pattern="G"),
        "G, added, nothing persistent": BASE.replace(pattern="G", combine="add", persistent=0, conv=1),
    }
    others = {
        "A": BASE.replace(pattern="A", tied_head=False),
        "C": BASE.replace(pattern="C", rule=preset("titans", remat=False)),
        "C, memory moved per chunk": BASE.replace(pattern="C", rule=PER_CHUNK, persistent=0),
        "D": BASE.replace(pattern="D"),
        "Dot": BASE.replace(pattern="D", dot_window=3),
        "M, moved per chunk": BASE.replace(pattern="M", rule=PER_CHUNK),
    }
    others |= {f"M {name}": BASE.replace(pattern="M", rule=preset(name, remat=False)) for name in PRESETS}
    return {name: (config, LONG, (1, 7, MAX_CHUNK)) for name, config in windows.items()} | {
        name: (config, SHORT, (1, 5)) for name, config in others.items()
    }


CASES = cases()


@functools.cache
def trained(config: LMConfig) -> tuple[Callable[..., jax.Array], LMParams]:
    """The training form, and random parameters none of which is at its start."""
    apply, shapes = split(nnx.eval_shape(lambda: create(config, 0)))
    rng = np.random.default_rng(1)

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        keeps = "['alpha']" in jax.tree_util.keystr(path)  # retention near 1: what is read long ago still counts
        return jnp.asarray(0.4 * rng.standard_normal(x.shape) + (2.0 if keeps and x.ndim == 2 else 0.0))

    return jit(apply), jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def streamed(config: LMConfig) -> Callable[..., tuple[LMState, jax.Array]]:
    """`extend`, compiled, with a donated state."""
    return jit(functools.partial(extend, config), donate_argnums=1)


def copied(state: LMState) -> LMState:
    return jax.tree.map(np.array, state)


def rows(state: LMState, which: np.ndarray) -> LMState:
    return jax.tree.map(lambda x: x[which], state)


_FURTHER = ("G, added, nothing persistent", "C, memory moved per chunk", "Dot", "M gated_deltanet", "M dla", "M swla")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in _FURTHER)) for name in CASES])
@FEW
@given(SEEDS)
def test_pieces_are_the_text(name: str, seed: int) -> None:
    """Rows at different places, of which some wait and all change places now and then."""
    config, length, sizes = CASES[name]
    apply, params = trained(config)
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, config.vocab, (ROWS, length)).astype(np.int32)
    found = np.zeros((ROWS, length, config.embed))
    row, done = np.arange(ROWS), np.zeros(ROWS, int)  # which text a row of the state reads, how much of each is read
    state = init_state(config, params, ROWS, context=length)
    while (done < length).any():
        left = (length - done)[row]
        size = int(rng.choice([s for s in sizes if s <= left.max()]))
        active = (left >= size) & (rng.random(ROWS) < 0.8)
        tokens = np.stack([np.roll(texts[r], -done[r])[:size] for r in row])
        before = copied(state)
        state, hidden = streamed(config)(params, state, jnp.asarray(tokens), jnp.asarray(active))
        jax.tree.map(np.testing.assert_array_equal, rows(copied(state), ~active), rows(before, ~active))
        for r, text in enumerate(row):
            if active[r]:
                found[text, done[text] : done[text] + size] = hidden[r]
                done[text] += size
        np.testing.assert_array_equal(state.position, done[row])
        if rng.random() < 0.2:
            order = rng.permutation(ROWS)
            state, row = jax.tree.map(jnp.asarray, rows(copied(state), order)), row[order]
    close(logits(config, params, jnp.asarray(found)), apply(params, jnp.asarray(texts)), 1e-8)


def test_rows_go_on_far_into_a_text() -> None:
    """A window does not depend on where it is, in float32 too; the ring's arithmetic goes with the position."""
    config = BASE.replace(persistent=0)
    with jax.enable_x64(False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "rope_table", rope_table)
        params = jax.tree.map(lambda x: x.astype(jnp.float32), trained(config)[1])
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (2, 24)), jnp.int32)
        state = init_state(config, params, 2)
        state = dataclasses.replace(state, position=jnp.asarray([0, 2**29 + 12_345], jnp.int32))
        found = []
        for piece in jnp.split(tokens.at[1].set(tokens[0]), 3, axis=1):
            state, hidden = streamed(config)(params, state, piece, jnp.ones(2, bool))
            found.append(hidden)
        seen = jnp.concatenate(found, axis=1)[:, config.window - 1 :]  # before, slots never written are in the window
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("int32"), jnp.dtype("float32")}
        assert seen.dtype == jnp.float32
        close(seen[1], seen[0], 1e-4)


def test_a_full_cache_loses_what_comes_after() -> None:
    """Tokens within it are what they were, and a row without room keeps its cache."""
    config, room = CASES["A"][0], 6
    params = trained(config)[1]
    tokens = jnp.arange(5, dtype=jnp.int32)[None]
    step = streamed(config)
    wide, _ = step(params, init_state(config, params, 1, context=SHORT), tokens, jnp.ones(1, bool))
    small, _ = step(params, init_state(config, params, 1, context=room), tokens, jnp.ones(1, bool))
    for _ in range(2):
        wide, small = (step(params, state, tokens, jnp.ones(1, bool))[0] for state in (wide, small))
    assert small.position == 15
    jax.tree.map(lambda a, b: close(a, b[:, :, :room]), small.layers, wide.layers)


@pytest.mark.parametrize("pattern", "ASMCGLD")
def test_bounded_states_have_one_size(pattern: str) -> None:
    config = BASE.replace(pattern=pattern)
    params = trained(config)[1]
    sizes = []
    for context in (10, 1000):
        state = jax.eval_shape(lambda context=context: init_state(config, params, ROWS, context=context))
        assert {x.shape[0] for x in jax.tree.leaves(state)} == {ROWS}
        sizes.append([x.shape for x in jax.tree.leaves(state)])
    assert (sizes[0] == sizes[1]) == bounded(config)


def test_bad_pieces_and_states_are_refused() -> None:
    params = trained(BASE)[1]
    for batch, context in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="positive"):
            init_state(BASE, params, batch, context=context)
    state = jax.eval_shape(lambda: init_state(BASE, params, 1))
    for length in (0, MAX_CHUNK + 1):
        with pytest.raises(ValueError, match="1 to 64"):
            extend(BASE, params, state, jnp.zeros((1, length), jnp.int32), jnp.ones(1, bool))
