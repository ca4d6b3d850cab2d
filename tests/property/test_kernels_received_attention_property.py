"""Attention that pairs receive: each form against softmaxes in float64, and what it must not depend on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.kv_pages import KeptPairs, LayerKV, unpacked
from atlas_jax.kernels.received_attention import received_attention, ref_received_attention
from tests.property.test_kernels_kept_property import (
    FORMS,
    SAMPLES,
    SCALE,
    SINKS,
    Form,
    Shape,
    needs_kernels,
    seeds,
    some_step,
    stored,
)

shapes = st.sampled_from([Shape(2, SAMPLES, 3, 2, 2, 2), Shape(3, SAMPLES // 2, 1, 1, 3, 1, 128)])


@functools.cache
def compiled(cpu: bool) -> Any:
    return jax.jit(lambda *args: received_attention(*args[:-1], SCALE, null_logit=args[-1]), static_argnums=9)


def run(cpu: bool, args: tuple[Any, ...], null_logit: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`received_attention`, traced with or without the kernels."""
    with KernelChoice(cpu=cpu).scope():
        ring, kept = compiled(cpu)(*args, null_logit)
    return np.asarray(ring), np.asarray(kept)


def some_queries(seed: int, shape: Shape, form: Form) -> tuple[Any, ...]:
    """Arguments of `received_attention`; the last query sees nothing of the ring, and some see no place of some pages."""
    random = np.random.default_rng(seed)
    step = some_step(seed, shape, form.dtype)
    row = int(random.integers(shape.rows))
    seen = np.array(step.seen[row]) & (random.random((shape.tokens, shape.pages, 1)) < 0.8)
    seen[-1] = False
    where = jnp.asarray(seen), jnp.asarray(random.random() < 0.5), *step.pairs.stretch[row], shape.kept_pages
    return step.q[row], step.q_sink[row], step.kv, step.pairs.pool, jnp.int32(row), *where


def definition(args: tuple[Any, ...], null_logit: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The sums in float64, one query after another."""
    q, q_near, kv, pool, row, seen, sinks_seen, first, kept, pages = args
    keys, near_keys = stored(kv.k)[row], stored(unpacked(pool.k))[row][first : first + pages]
    sinks = np.asarray(kv.sink_k, np.float64)[row][:, : SINKS if sinks_seen else 0]
    filled = np.arange(near_keys.shape[0] * PAGE).reshape(-1, PAGE) < int(kept)
    ring, pairs = np.zeros(keys.shape[:3]), np.zeros(near_keys.shape[:3])
    groups = q.shape[1] // keys.shape[1]
    for sample, head in np.ndindex(*q.shape[:2]):
        group, mask = head // groups, np.asarray(seen[sample])
        far, near = (np.asarray(x, np.float64)[sample, head] for x in (q, q_near))
        score = np.concatenate([keys[:, group][mask] @ far, sinks[group] @ near, near_keys[:, group][filled] @ near])
        if not score.size:
            continue
        peak = max(SCALE * score.max(), -np.inf if null_logit is None else null_logit[head])
        weight = np.exp(SCALE * score - peak)
        weight /= weight.sum() + (0.0 if null_logit is None else np.exp(null_logit[head] - peak))
        ring[:, group][mask] += weight[: mask.sum()]
        pairs[:, group][filled] += weight[weight.size - filled.sum() :]
    return ring, pairs


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=5)
@given(seed=seeds, shape=shapes, nulls=st.booleans())
def test_pairs_receive_the_probabilities_of_one_softmax(form: Form, seed: int, shape: Shape, nulls: bool) -> None:
    args = some_queries(seed, shape, form)
    q, q_near, kv, pool, row, seen, sinks_seen, first, kept, pages = args
    null_logit = np.random.default_rng(seed).normal(0.0, 6.0, q.shape[1]).astype(np.float32) if nulls else None
    wanted = definition(args, null_logit)
    k, kept_k = (jnp.asarray(stored(x)[row], jnp.float32) for x in (kv.k, unpacked(pool.k)))
    kept_k = kept_k[first : first + pages]
    plain = ref_received_attention(q, q_near, k, kv.sink_k[row], kept_k, seen, sinks_seen, kept, SCALE, null_logit)
    for found, other, ref, exact in zip(
        run(form.cpu, args, null_logit), run(False, args, null_logit), plain, wanted, strict=True
    ):
        np.testing.assert_allclose(ref, exact, atol=1e-5)
        np.testing.assert_allclose(found, exact, atol=form.rounding)
        np.testing.assert_allclose(found, other, atol=1e-5)
        np.testing.assert_array_equal(found[exact == 0], 0.0)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=4)
@given(seed=seeds, shape=shapes)
def test_received_attention_depends_on_the_row_alone(form: Form, seed: int, shape: Shape) -> None:
    """Neither on other rows, nor on other layers' pairs, nor on what lies in places that are not filled."""
    q, q_near, kv, pool, row, *rest = some_queries(seed, shape, form)
    first, kept, pages = int(rest[2]), int(rest[3]), pool.stored_score.shape[1]
    index = np.arange(pages * PAGE).reshape(1, pages, 1, PAGE) - first * PAGE
    own = (np.arange(shape.rows) == int(row)).reshape(-1, 1, 1, 1) & (index >= 0) & (index < kept)

    def disturbed(leaf: jax.Array) -> jax.Array:
        noise = np.asarray(
            {1: 77, 2: 0x7FC0, 4: np.nan}[leaf.dtype.itemsize], leaf.dtype
        )  # two bytes: the upper half of a NaN
        return jnp.where(own.reshape(*own.shape, *(1,) * (leaf.ndim - 4)), leaf, noise)

    other = dataclasses.replace(pool, k=jax.tree.map(disturbed, pool.k))
    alone: tuple[LayerKV, KeptPairs] = jax.tree.map(lambda leaf: leaf[int(row) : int(row) + 1], (kv, pool))
    wanted = run(form.cpu, (q, q_near, kv, pool, row, *rest))
    for changed in ((q, q_near, kv, other, row), (q, q_near, *alone, jnp.int32(0))):
        for found, before in zip(run(form.cpu, (*changed, *rest)), wanted, strict=True):
            np.testing.assert_array_equal(found, before)


@needs_kernels
@settings(deadline=None, max_examples=4)
@given(seed=seeds, shape=shapes)
def test_received_attention_is_that_of_its_queries_one_by_one(seed: int, shape: Shape) -> None:
    q, q_near, kv, pool, row, seen, *rest = some_queries(seed, shape, Form(True, "int8", 1e-3, 0.03))
    together = run(True, (q, q_near, kv, pool, row, seen, *rest))
    each = [
        run(True, (q[one], q_near[one], kv, pool, row, seen[one], *rest))
        for one in (slice(t, t + 1) for t in range(0, shape.tokens))
    ]
    for found, parts in zip(together, zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(found, np.sum(parts, axis=0, dtype=np.float64), rtol=1e-4, atol=1e-6)
