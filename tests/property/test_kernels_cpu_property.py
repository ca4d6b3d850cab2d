"""The C kernels against XLA's programs and the definitions, and what they must not depend on."""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.kernels import attention
from atlas_jax.kernels.attention import ref_window_attention, window_attention
from atlas_jax.kernels.cpu import ffi, library
from atlas_jax.kernels.fused_linear import gated_linear, normed_linear, summed_linear
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.kv_pages import LayerKV, QuantPages
from atlas_jax.kernels.linear import (
    PackedArray,
    QuantArray,
    Weight,
    linear,
    linear_each,
    pack_floats,
    pack_levels,
    pack_weight,
    quantize_weight,
    split_rows,
    unpack,
)
from atlas_jax.kernels.linear import uses_cpu_kernel as linear_uses_cpu_kernel
from atlas_jax.kernels.monomials import gather_monomials
from atlas_jax.kernels.weight_forms import Form
from atlas_jax.recall import recall_memory
from tests.property.rounding_support import halfway

available = library.available()
needs_kernels = pytest.mark.skipif(not available, reason="no C compiler, or no AVX-512 VNNI")
seeds = st.integers(0, 2**32 - 1)
DIM, SINKS, SCALE = 64, 4, 0.125


@functools.cache
def compiled(function: Any) -> Any:
    return jax.jit(function)


def run(cpu: bool, function: Any, *args: Any) -> np.ndarray:
    """A function traced with or without the kernels."""
    with KernelChoice(cpu=cpu).scope():
        return np.asarray(compiled(function)(*args))


def product(weight: Weight, x: jax.Array) -> jax.Array:
    return linear(weight, x)


@needs_kernels
@settings(deadline=None, max_examples=6)
@example(seed=630, rows=36, inner=64, outputs=80, spread=1e6, halves=False)  # one number halfway between two whole ones
@given(
    seed=seeds,
    rows=st.integers(1, 300),
    inner=st.integers(1, 5).map(lambda n: 64 * n),
    outputs=st.integers(1, 9).map(lambda n: 16 * n),
    spread=st.sampled_from([1.0, 1e-20, 1e6, 1e33]),
    halves=st.booleans(),
)
def test_products_have_the_bits_of_xlas(
    seed: int, rows: int, inner: int, outputs: int, spread: float, halves: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = QuantArray(*map(jnp.asarray, quantize_weight(rng.normal(size=(outputs, inner)).astype(np.float32))))
    values = rng.normal(size=(rows, inner)) * rng.choice([1.0, 30.0, 3000.0], p=[0.95, 0.04, 0.01], size=(rows, inner))
    x = jnp.asarray((values * spread).astype(np.float32)).at[0].set(0.0)  # some numbers stand out
    x = halfway(x) if halves else x
    found, wanted = (run(use, product, weight, x) for use in (True, False))
    np.testing.assert_array_equal(found, wanted)


def packed_weight(rng: np.random.Generator, outputs: int, inner: int) -> PackedArray:
    codes = rng.integers(0, 16, (outputs, inner)).astype(np.uint8)
    step, base = (rng.normal(size=(outputs, inner // 32)).astype(np.float32) for _ in range(2))
    return PackedArray(*map(jnp.asarray, pack_weight(codes, step, base - 8 * step)))


def floats_weight(rng: np.random.Generator, outputs: int, inner: int) -> PackedArray:
    """Blocks of a few of the sizes that there are, whose largest number fits: some in full, some rounded, some all 0."""
    codes = rng.integers(0, 16, (outputs, inner)).astype(np.uint8)
    exponent = rng.integers(120, 126, (outputs, 1)) + rng.integers(-11, 1, (outputs, inner // 32))
    return PackedArray(*map(jnp.asarray, pack_floats(codes, exponent.astype(np.uint8))), Form.FLOATS)


def levels_weight(rng: np.random.Generator, outputs: int, inner: int) -> PackedArray:
    codes = rng.integers(0, 16, (outputs, inner)).astype(np.uint8)
    step = (rng.normal(size=(outputs, inner // 32)) * np.exp(rng.normal(size=(outputs, 1)))).astype(np.float32)
    return PackedArray(*map(jnp.asarray, pack_levels(codes, step)), Form.LEVELS)


@needs_kernels
@pytest.mark.parametrize("coded", [packed_weight, floats_weight, levels_weight])
@settings(deadline=None, max_examples=6)
@given(
    seed=seeds,
    rows=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 17, 128, 300]),
    inner=st.integers(1, 5).map(lambda n: 64 * n),
    outputs=st.integers(1, 9).map(lambda n: 16 * n),
)
def test_products_with_packed_weights_are_those_of_the_weights_unpacked(
    coded: Callable[[np.random.Generator, int, int], PackedArray], seed: int, rows: int, inner: int, outputs: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = coded(rng, outputs, inner)
    x = jnp.asarray(rng.normal(size=(rows, inner)).astype(np.float32))
    wanted = run(False, product, unpack(weight), x)
    np.testing.assert_array_equal(run(True, product, weight, x), wanted)
    np.testing.assert_array_equal(run(False, product, weight, x), wanted)


def each_product(weight: QuantArray, x: jax.Array) -> jax.Array:
    return linear_each(weight, x)


@needs_kernels
@settings(deadline=None, max_examples=6)
@given(
    seed=seeds, batch=st.integers(1, 5), tokens=st.sampled_from([1, 5, 17, 130]), outputs=st.sampled_from([16, 96, 208])
)
def test_a_matrix_for_each_row_is_one_product_after_the_other(seed: int, batch: int, tokens: int, outputs: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, (batch, outputs, 128)).astype(np.int8)
    weight = QuantArray(jnp.asarray(values), jnp.asarray(rng.uniform(0.1, 1.0, (batch, outputs)).astype(np.float32)))
    x = jnp.asarray(rng.normal(size=(batch, tokens, 128)).astype(np.float32))
    found = run(True, each_product, weight, x)
    np.testing.assert_array_equal(found, run(False, each_product, weight, x))
    for b in range(batch):
        alone = run(True, product, QuantArray(weight.values[b], weight.scale[b]), x[b])
        np.testing.assert_array_equal(found[b], alone)


@needs_kernels
@pytest.mark.parametrize("rows", [*range(1, 10), 20])
def test_without_amx_products_are_the_same(rows: int, built: Path, tmp_path: Path) -> None:
    """A copy of the library that has not been asked what the processor has takes the path of VNNI alone."""
    copy = ctypes.CDLL(shutil.copy(built, tmp_path / "copy.so"))
    rng = np.random.default_rng(rows)
    weight = QuantArray(*map(jnp.asarray, quantize_weight(rng.normal(size=(80, 192)).astype(np.float32))))
    packed = packed_weight(rng, 80, 192)
    x = jnp.asarray(rng.normal(size=(rows, 192)).astype(np.float32))
    target = f"atlas_linear_{tmp_path.name}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(copy.atlas_linear), platform="cpu")
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((rows, 80), jnp.float32))
    found = jax.jit(call)(x, weight.values, weight.scale)
    np.testing.assert_array_equal(found, run(False, product, weight, x))
    found = jax.jit(call)(x, packed.blocks, packed.scale)
    np.testing.assert_array_equal(found, run(False, product, packed, x))


@needs_kernels
@settings(deadline=None, max_examples=6)
@given(
    seed=seeds,
    rows=st.integers(1, 5),
    vocab=st.sampled_from([16, 100, 4096, 4097, 9000]),
    spread=st.sampled_from([0.1, 30]),
)
def test_the_greedy_choice_is_the_first_of_the_best(seed: int, rows: int, vocab: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(rows, vocab)) * spread, 1).astype(np.float32)  # rounded: there are ties
    scores[0, rng.integers(vocab)] = -1e30
    token, log_mass = jax.jit(ffi.greedy)(scores)
    np.testing.assert_array_equal(token, scores.argmax(axis=1))
    wide = scores.astype(np.float64)
    peak = wide.max(axis=1)
    wanted = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    np.testing.assert_allclose(log_mass, wanted, rtol=1e-6, atol=1e-6)


@needs_kernels
@settings(deadline=None, max_examples=6)
@given(seed=seeds, tokens=st.integers(1, 3), vocab=st.sampled_from([48, 4100, 8200]), silent=st.booleans())
def test_the_blend_is_its_definition(seed: int, tokens: int, vocab: int, silent: bool) -> None:
    rng = np.random.default_rng(seed)
    rows, size = 3, 128
    logits = rng.normal(size=(rows, tokens, vocab)).astype(np.float32) * 4
    codes = QuantArray(jnp.asarray(rng.integers(-127, 128, (vocab, size)).astype(np.int8)), jnp.full(vocab, 1e-3))
    found = rng.normal(size=(rows, tokens, size)).astype(np.float32) * 0.2 * (0.0 if silent else 1.0)
    seen = (rng.random((rows, vocab)) < 0.1).astype(np.int8)
    seen[0] = 0
    active = rng.random((rows, tokens)) < 0.8
    odds = rng.normal(size=(rows, tokens)).astype(np.float32)
    gate = np.asarray([-1.0, 2.0, 1.0, 0.2], np.float32)
    args = found, codes.values, codes.scale, seen, active, odds, gate
    mixed, passed = jax.jit(ffi.blend)(jnp.asarray(logits), *args)
    scores = jnp.where(seen[:, None, :] > 0, run(False, linear, codes, jnp.asarray(found)), -2.0)
    adapter = SimpleNamespace(gate=jnp.asarray(gate))
    wanted, wanted_gate = recall_memory.blend(adapter, odds, jnp.asarray(logits), scores, active)  # type: ignore[arg-type]
    np.testing.assert_allclose(passed, wanted_gate, atol=2e-6)
    np.testing.assert_allclose(mixed, wanted, rtol=2e-5, atol=2e-5)
    untouched = np.asarray(passed) == 0
    np.testing.assert_array_equal(np.asarray(mixed)[untouched], logits[untouched])
    assert untouched[0].all()
    assert untouched.all() or not silent


@needs_kernels
@settings(deadline=None, max_examples=6)
@given(seed=seeds, tokens=st.sampled_from([1, 3, 8, 19]))
def test_monomials_are_those_of_xla(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    batch, size, degrees, count, order = 3, 10, 2, 32, 3
    key = rng.normal(size=(batch, tokens, size)).astype(np.float32)
    factors = rng.integers(0, size + 1, (degrees, count, order)).astype(np.int32)
    weight = rng.normal(size=(degrees, count)).astype(np.float32)
    degree = rng.integers(0, degrees, batch).astype(np.int32)
    found = jax.jit(ffi.monomials)(key, factors, weight, degree)
    wanted = jax.vmap(gather_monomials)(key, factors[degree], weight[degree])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    rounded = jax.jit(functools.partial(ffi.monomials, rounded=True))(key, factors, weight, degree)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, found.astype(jnp.bfloat16))


def some_attention(seed: int, batch: int, tokens: int, groups: int, kv_heads: int, pages: int) -> tuple[Any, ...]:
    """Queries, a cache, and masks in which every token sees something."""
    rng = np.random.default_rng(seed)

    def floats(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    def ring() -> QuantPages:
        shape = (batch, pages, kv_heads, PAGE)
        values = rng.integers(-127, 128, (*shape, DIM)).astype(np.int8)
        return QuantPages(jnp.asarray(values), jnp.asarray(rng.uniform(1e-3, 0.02, shape).astype(np.float32)))

    heads = (batch, tokens, groups * kv_heads, DIM)
    kv = LayerKV(ring(), ring(), floats(batch, kv_heads, SINKS, DIM), floats(batch, kv_heads, SINKS, DIM))
    seen = (rng.random((batch, tokens, pages, PAGE)) < 0.5) & (rng.random((batch, 1, pages, 1)) < 0.7)
    seen[:, :, rng.integers(pages), rng.integers(PAGE)] = True
    return floats(*heads), floats(*heads), kv, jnp.asarray(seen), jnp.asarray(rng.random((batch, tokens)) < 0.5)


def attend(*args: Any) -> jax.Array:
    return window_attention(*args, SCALE)


shapes = st.sampled_from([(1, 1, 1, 1, 1), (2, 4, 3, 1, 4), (3, 1, 4, 3, 2), (2, 3, 2, 2, 6), (1, 19, 3, 1, 3)])


@needs_kernels
@settings(deadline=None, max_examples=6)
@given(seed=seeds, shape=shapes)
def test_attention_is_its_definition_up_to_the_rounding_of_queries(seed: int, shape: tuple[int, ...]) -> None:
    q, q_sink, kv, seen, sinks_seen = some_attention(seed, *shape)
    found = run(True, attend, q, q_sink, kv, seen, sinks_seen)
    np.testing.assert_allclose(found, run(False, attend, q, q_sink, kv, seen, sinks_seen), atol=1e-3)
    plain = [ring.values * ring.scale[..., None] for ring in (kv.k, kv.v)]
    wanted = ref_window_attention(q, q_sink, *plain, kv.sink_k, kv.sink_v, seen, sinks_seen, SCALE)
    np.testing.assert_allclose(found, wanted, atol=0.03)


@needs_kernels
@settings(deadline=None, max_examples=6)
@given(seed=seeds, shape=shapes)
def test_a_tokens_attention_depends_on_nothing_beside_it(seed: int, shape: tuple[int, ...]) -> None:
    q, q_sink, kv, seen, sinks_seen = some_attention(seed, *shape)
    together = run(True, attend, q, q_sink, kv, seen, sinks_seen)
    for b in range(shape[0]):
        row = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], kv)
        for t in range(shape[1]):
            at = np.s_[b : b + 1, t : t + 1]
            alone = run(True, attend, q[at], q_sink[at], row, seen[at], sinks_seen[at])
            np.testing.assert_array_equal(alone, together[at])


@needs_kernels
@settings(deadline=None, max_examples=6)
@given(seed=seeds, shape=shapes)
def test_what_is_not_seen_does_not_count(seed: int, shape: tuple[int, ...]) -> None:
    q, q_sink, kv, seen, sinks_seen = some_attention(seed, *shape)
    before = run(True, attend, q, q_sink, kv, seen, sinks_seen)
    hidden = ~np.asarray(seen).any(axis=1)  # [B, N, P]
    noise = np.random.default_rng(seed).integers(-128, 128, kv.k.values.shape).astype(np.int8)

    def disturbed(ring: QuantPages) -> QuantPages:
        values = jnp.where(hidden[:, :, None, :, None], noise, ring.values)
        return QuantPages(values, jnp.where(hidden[:, :, None], 1e4, ring.scale))

    other = LayerKV(disturbed(kv.k), disturbed(kv.v), kv.sink_k, kv.sink_v)
    np.testing.assert_array_equal(run(True, attend, q, q_sink, other, seen, sinks_seen), before)


@needs_kernels
def test_many_calls_at_once_all_end() -> None:
    """More callers than the pool has threads: none may wait for a part that nobody begins."""
    rng = np.random.default_rng(0)
    weight = QuantArray(*map(jnp.asarray, quantize_weight(rng.normal(size=(1024, 256)).astype(np.float32))))
    x = jnp.asarray(rng.normal(size=(4, 256)).astype(np.float32))
    step = jax.jit(lambda w, x: sum(linear(w, x + i).sum() for i in range(20)))
    wanted = float(step(weight, x))
    wrong: list[float] = []

    def work() -> None:
        for _ in range(20):
            found = float(step(weight, x))
            if found != wanted:
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong


def test_without_a_compiler_xla_does_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "atlas.kernels"):
            assert not linear_uses_cpu_kernel(64, 64)
        assert "native kernels" in caplog.text
        weight = QuantArray(jnp.ones((16, 64), jnp.int8), jnp.ones((16,)))
        np.testing.assert_allclose(linear(weight, jnp.ones((2, 64))), np.full((2, 16), 64.0), rtol=1e-6)
    finally:
        library.available.cache_clear()
    assert not list((tmp_path / "atlas-jax" / "native").iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, compiled."""
    return library.build(tmp_path_factory.mktemp("native"))


@pytest.fixture
def fresh(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that the kernels are kept in, one of the test's own, and a compiler that has done its work before."""
    _compiler(tmp_path, monkeypatch, f'for output; do :; done; cp "{built}" "$output"')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "atlas-jax" / "native"


def _compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    script = folder / "cc"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))


@needs_kernels
@pytest.mark.parametrize("damage", [slice(0, 4096), slice(0, -1), slice(0, 0), slice(1, None)])
def test_a_damaged_library_is_built_anew(damage: slice, fresh: Path) -> None:
    fresh.mkdir(parents=True)
    file = library.build(fresh)
    whole = file.read_bytes()
    file.write_bytes(whole[damage])
    assert library._library().atlas_supported()
    assert file.read_bytes() == whole


@needs_kernels
def test_a_cache_that_cannot_be_written_costs_no_kernels(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh.parent.mkdir()
    fresh.write_text("a file where the folder should be")
    assert library._library().atlas_supported()
    assert not caplog.records


@needs_kernels
def test_kernels_that_are_shipped_need_no_compiler(
    built: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / built.name).write_bytes(built.read_bytes())
    monkeypatch.setattr(library, "SHIPPED", shipped)
    _compiler(tmp_path, monkeypatch, "exit 1")
    assert library._library().atlas_supported()
    assert not fresh.exists()


@needs_kernels
def test_a_compiler_that_takes_long_is_waited_for(
    fresh: Path, built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_NEWS_SECONDS", 0.05)
    _compiler(tmp_path, monkeypatch, f'for output; do :; done; sleep 0.5; cp "{built}" "$output"')
    assert library._library().atlas_supported()
    assert "still being compiled" in caplog.text


@needs_kernels
def test_a_compiler_that_never_ends_is_given_up(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_NEWS_SECONDS", 0.05)
    monkeypatch.setattr(library, "_BUILD_SECONDS", 0.2)
    _compiler(tmp_path, monkeypatch, "sleep 3600")
    library.available.cache_clear()
    assert not library.available()
    library.available.cache_clear()
    assert "the next start" in caplog.text
    assert not list(fresh.iterdir())


def test_shapes_they_do_not_take_are_left_to_xla() -> None:
    assert not linear_uses_cpu_kernel(96, 64)
    assert not linear_uses_cpu_kernel(64, 8)
    assert not attention.uses_cpu_kernel(1, 80, SINKS)
    assert not attention.uses_cpu_kernel(PAGE + 1, 64, SINKS)
    assert not attention.uses_cpu_kernel(1, 64, 17)


def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * gain


def normed_product(weight: Weight, x: jax.Array, gain: jax.Array) -> jax.Array:
    return normed_linear(weight, x, gain, 1e-5)


def silu_product(weight: Weight, x: jax.Array) -> jax.Array:
    return gated_linear(weight, x, 64, "silu")


def gelu_product(weight: Weight, x: jax.Array) -> jax.Array:
    return gated_linear(weight, x, 64, "gelu_tanh")


def swiglu_product(weight: Weight, x: jax.Array) -> jax.Array:
    return gated_linear(weight, x, 64, "swiglu_oai")


def summed_product(weight: Weight, x: jax.Array, added: jax.Array, gain: jax.Array) -> jax.Array:
    return jnp.concatenate(summed_linear(weight, x, added, None, gain, 1e-5), axis=-1)


def post_summed_product(
    weight: Weight, x: jax.Array, added: jax.Array, added_gain: jax.Array, gain: jax.Array
) -> jax.Array:
    return jnp.concatenate(summed_linear(weight, x, added, added_gain, gain, 1e-5), axis=-1)


@needs_kernels
@settings(deadline=None, max_examples=4)
@given(
    seed=seeds,
    rows=st.sampled_from([1, 2, 5, 16, 130]),
    inner=st.integers(1, 4).map(lambda n: 64 * n),
    packed=st.booleans(),
    spread=st.sampled_from([1.0, 1e-12, 30.0, 1e6]),
)
def test_a_sum_a_norm_or_a_gate_before_a_product_is_the_definition(
    seed: int, rows: int, inner: int, packed: bool, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(48, inner)).astype(np.float32)
    weight = packed_weight(rng, 48, inner) if packed else QuantArray(*map(jnp.asarray, quantize_weight(matrix)))
    bytes_of = unpack(weight) if isinstance(weight, PackedArray) else weight
    exact = np.asarray(bytes_of.values, np.float64) * np.asarray(bytes_of.scale, np.float64)[:, None]
    x = (rng.normal(size=(rows, 2 * inner)) * spread).astype(np.float32)
    gain = rng.normal(size=inner).astype(np.float32)
    wide = x.astype(np.float64)
    gate, up = wide.reshape(rows, -1, 2, 64).transpose(2, 0, 1, 3).reshape(2, rows, inner)
    half = wide[:, :inner]
    with np.errstate(over="ignore"):  # exp of a large gate: 1 / ∞ is the 0 that is meant
        gelu = gate / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        silu = gate / (1 + np.exp(-gate))
        low = np.minimum(gate, 7.0)
        swiglu = low / (1 + np.exp(-1.702 * low)) * (np.clip(up, -7.0, 7.0) + 1.0)
    added = wide[:, inner:]
    added_gain = rng.normal(size=inner).astype(np.float32)
    total, post_total = half + added, half + norm(added, added_gain)
    first, second = x[:, :inner], x[:, inner:]
    cases = (
        (normed_product, (first, gain), norm(half, gain), None),
        (summed_product, (first, second, gain), norm(total, gain), total),
        (post_summed_product, (first, second, added_gain, gain), norm(post_total, gain), post_total),
        (silu_product, (x,), silu * up, None),
        (gelu_product, (x,), gelu * up, None),
        (swiglu_product, (x,), swiglu, None),
    )
    for function, args, before, sums in cases:
        given = tuple(map(jnp.asarray, args))
        by_rows = sum(array.ndim == 2 for array in args)
        found, plain = (run(wanted, function, weight, *given) for wanted in (True, False))
        alone = run(True, function, weight, *(array[-1:] for array in given[:by_rows]), *given[by_rows:])
        np.testing.assert_array_equal(found[-1:], alone)
        if sums is not None:
            np.testing.assert_allclose(found[:, 48:], sums, rtol=1e-6, atol=1e-6 * np.abs(wide).max())
            np.testing.assert_allclose(plain[:, 48:], sums, rtol=1e-6, atol=1e-6 * np.abs(wide).max())
        half_unit = np.asarray(split_rows(before.astype(np.float32))[2], np.float64) / 2
        off = half_unit * 1.02 + np.abs(before).max(axis=1, keepdims=True) * 2**-18  # a mean near a step of the unit
        room = off * np.abs(exact).sum(axis=1) + 1e-30
        np.testing.assert_array_less(np.abs(found[:, :48] - before @ exact.T), room)
        np.testing.assert_array_less(np.abs(plain[:, :48] - before @ exact.T), room)
