"""The TPU kernels, interpreted on the CPU, against definitions in float64; and compiled by Mosaic for a described TPU."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec, SingleDeviceSharding

from atlas_jax.config import PAGE, LayerConfig, MemoryConfig, ModelConfig, RopeConfig
from atlas_jax.kernels import attention, recall_features
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.kv_pages import KeptPairs, LayerKV, LayerPairs, QuantPages, RingView, init_layer_kv, unpacked
from atlas_jax.kernels.linear import split_rows
from atlas_jax.kernels.packed_pages import KEY_BITS, VALUE_BITS, pack
from atlas_jax.kernels.rope import rope_table
from atlas_jax.kernels.tpu import recall_features as mosaic_recall_features
from atlas_jax.kernels.tpu import window_attention
from atlas_jax.model.params import LayerParams
from atlas_jax.model.transformer import run_layers, step_view
from atlas_jax.recall import recall_memory, recall_state
from atlas_jax.recall.adapter import GATE_FEATURES, Adapter, make_adapter
from tests.reference import recall_reference
from tests.reference.attention_reference import attend, visible_positions

SINKS = 4
seeds = st.integers(0, 2**32 - 1)


INTERPRETED = KernelChoice(interpret_tpu=True)


@dataclass(frozen=True)
class Shape:
    """A step's shape, and the model's own window, all of which a compiled kernel is bound to."""

    rows: int
    tokens: int
    kv_heads: int
    groups: int
    dim: int
    ring: int
    sliding_window: int | None = None
    kept_pages: int = 0

    @property
    def scale(self) -> float:
        return self.dim**-0.5


# head_dim 64 and 32 are read with the tokens last, 128 as it lies; three heads have their scales slot by slot, eight not
SHAPES = (
    Shape(rows=2, tokens=1, kv_heads=3, groups=3, dim=64, ring=4),
    Shape(rows=2, tokens=4, kv_heads=1, groups=2, dim=32, ring=16, sliding_window=150),
    Shape(rows=1, tokens=35, kv_heads=8, groups=4, dim=128, ring=8),
    Shape(rows=3, tokens=2, kv_heads=3, groups=3, dim=64, ring=4, kept_pages=3),
    Shape(rows=2, tokens=3, kv_heads=1, groups=2, dim=32, ring=2, kept_pages=2),
    Shape(rows=1, tokens=1, kv_heads=8, groups=2, dim=128, ring=4, kept_pages=9),
)


@functools.cache
def interpreted(shape: Shape) -> Any:
    def run(
        q: jax.Array,
        q_sink: jax.Array,
        kv: LayerKV,
        view: RingView,
        pairs: LayerPairs | None,
        null_logit: jax.Array | None = None,
    ) -> jax.Array:
        rest = shape.sliding_window, shape.scale, pairs, null_logit
        return window_attention.attention(q, q_sink, kv, view, *rest, interpret=True)

    return jax.jit(run)


def some_step(shape: Shape, seed: int) -> tuple[jax.Array, jax.Array, LayerKV, RingView, LayerPairs | None]:
    """Queries and a ring in any order: pages of the text, the window's and older ones, between slots that hold none."""
    random = np.random.default_rng(seed)
    batch = shape.rows

    def floats(*size: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(size).astype(np.float32))

    def pages(count: int) -> QuantPages:
        size = (batch, count, shape.kv_heads, PAGE)
        values = random.integers(-127, 128, (*size, shape.dim)).astype(np.int8)
        return QuantPages(jnp.asarray(values), jnp.asarray(random.uniform(1e-3, 0.02, size).astype(np.float32)))

    sinks = batch, shape.kv_heads, SINKS, shape.dim
    kv = LayerKV(pages(shape.ring), pages(shape.ring), floats(*sinks), floats(*sinks))
    pairs = None
    if shape.kept_pages:
        pool, first = shape.kept_pages + 2, random.integers(3)  # of other layers before it and behind
        packed = [
            pack(whole.values, whole.scale, bits)
            for whole, bits in ((pages(pool), KEY_BITS), (pages(pool), VALUE_BITS))
        ]
        both = KeptPairs(packed[0], packed[1], jnp.zeros((batch, pool, shape.kv_heads, PAGE)))
        most = shape.kept_pages * PAGE
        kept = random.choice([0, 1, PAGE, most, *random.integers(0, most + 1, 4)], batch)
        stretch = np.stack([np.full(batch, first), kept], axis=1)
        pairs = LayerPairs(both, jnp.asarray(stretch, jnp.int32), shape.kept_pages)
    labels = np.full((batch, shape.ring), -1, np.int32)
    slot, first_page = np.zeros((2, batch), np.int32)
    positions = np.zeros((batch, shape.tokens), np.int32)
    for row in range(batch):
        last = int(random.integers(0, 3 * shape.ring))
        held = int(random.integers(1, min(last + 1, shape.ring) + 1))
        places = random.permutation(shape.ring)[:held]
        labels[row, places] = np.arange(last - held + 1, last + 1)
        slot[row] = places[-1]
        first_page[row] = random.integers(max(0, last - held + 1), last + 1)
        start = random.choice([0, PAGE - shape.tokens, random.integers(0, PAGE - shape.tokens + 1)])
        positions[row] = last * PAGE + start + np.arange(shape.tokens)
    view = RingView(*map(jnp.asarray, (labels, slot, positions, np.ones(positions.shape, bool), first_page)))
    heads = batch, shape.tokens, shape.kv_heads * shape.groups, shape.dim
    return floats(*heads), floats(*heads), kv, view, pairs


def stored(pages: Any) -> np.ndarray:
    return np.asarray(pages.values, np.float64) * np.asarray(pages.scale, np.float64)[..., None]


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), seeds, st.booleans())
def test_attention_is_a_softmax_over_the_window_and_the_sinks(shape: Shape, seed: int, nulls: bool) -> None:
    q, q_sink, kv, view, pairs = some_step(shape, seed)
    null_logit = np.random.default_rng(seed).normal(0.0, 6.0, q.shape[2]).astype(np.float32) if nulls else None
    out = np.asarray(interpreted(shape)(q, q_sink, kv, view, pairs, null_logit), np.float64)
    keys, values = stored(kv.k), stored(kv.v)
    sink_k, sink_v = np.asarray(kv.sink_k, np.float64), np.asarray(kv.sink_v, np.float64)
    if pairs is not None:
        own = int(pairs.stretch[0, 0])
        kept_k, kept_v = (stored(unpacked(x))[:, own : own + pairs.pages] for x in (pairs.pool.k, pairs.pool.v))
    labels = np.asarray(view.page)
    random = np.random.default_rng(seed)
    for row in range(shape.rows):
        first = int(view.first_page[row])
        for token in {0, shape.tokens - 1, int(random.integers(shape.tokens))}:
            where = visible_positions(int(view.positions[row, token]), first, shape.sliding_window, PAGE)
            where = [p for p in where if p // PAGE in labels[row]]
            slots, offsets = (
                [int(np.flatnonzero(labels[row] == p // PAGE)[0]) for p in where],
                [p % PAGE for p in where],
            )
            for head in {0, q.shape[2] - 1, int(random.integers(q.shape[2]))}:
                group = head // shape.groups
                query = np.asarray(q[row, token, head], np.float64)
                own_k, own_v = keys[row, slots, group, offsets], values[row, slots, group, offsets]
                near_k, near_v = [], []
                if first > 0 and shape.sliding_window is None:
                    near_k.append(sink_k[row, group])
                    near_v.append(sink_v[row, group])
                if pairs is not None:
                    near_k.append(kept_k[row, :, group].reshape(-1, shape.dim)[: int(pairs.count[row])])
                    near_v.append(kept_v[row, :, group].reshape(-1, shape.dim)[: int(pairs.count[row])])
                if near_k:
                    # these are met by a query of their own; as one product: [q, 0]·[k, 0] or [0, q_sink]·[0, k]
                    near = np.concatenate(near_k)
                    query = np.concatenate([query, np.asarray(q_sink[row, token, head], np.float64)])
                    near = np.concatenate([np.zeros_like(near), near], axis=1)
                    own_k = np.concatenate([np.concatenate([own_k, np.zeros_like(own_k)], axis=1), near])
                    own_v = np.concatenate([own_v, *near_v])
                wanted = attend(query, own_k, own_v, shape.scale, null_logit[head] if null_logit is not None else None)
                assert np.abs(out[row, token, head] - wanted).max() <= 3e-5 * np.abs(own_v).max()


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), seeds)
def test_what_is_not_seen_changes_no_bit(shape: Shape, seed: int) -> None:
    q, q_sink, kv, view, pairs = some_step(shape, seed)
    before = np.asarray(interpreted(shape)(q, q_sink, kv, view, pairs))
    token = np.asarray(view.page)[:, :, None] * PAGE + np.arange(PAGE)
    seen = (token >= np.asarray(view.first_page)[:, None, None] * PAGE) & (np.asarray(view.page) >= 0)[:, :, None]
    seen &= token <= np.asarray(view.positions).max(axis=1)[:, None, None]
    if shape.sliding_window is not None:
        seen &= token > np.asarray(view.positions).min(axis=1)[:, None, None] - shape.sliding_window
    seen = seen[:, :, None]
    noise = np.random.default_rng(seed).integers(-128, 128, kv.k.values.shape).astype(np.int8)

    def disturbed(pages: Any) -> QuantPages:
        return QuantPages(jnp.where(seen[..., None], pages.values, noise), jnp.where(seen, pages.scale, 1e4))

    def disturbed_pairs(leaf: jax.Array, first: int, count: np.ndarray) -> jax.Array:
        index = np.arange(leaf.shape[1] * PAGE).reshape(-1, 1, PAGE) - first * PAGE
        filled = (index >= 0) & (index < count.reshape(-1, 1, 1, 1))
        return jnp.where(filled.reshape(*filled.shape, *(1,) * (leaf.ndim - 4)), leaf, 99 if leaf.ndim > 4 else np.nan)

    other = dataclasses.replace(kv, k=disturbed(kv.k), v=disturbed(kv.v))
    if pairs is not None:
        where = int(pairs.stretch[0, 0]), np.asarray(pairs.count)
        k, v = jax.tree.map(lambda leaf: disturbed_pairs(leaf, *where), (pairs.pool.k, pairs.pool.v))
        pairs = dataclasses.replace(pairs, pool=dataclasses.replace(pairs.pool, k=k, v=v))
    assert np.array_equal(interpreted(shape)(q, q_sink, other, view, pairs), before)


def test_a_row_that_sees_nothing_is_zero_and_harms_nobody() -> None:
    shape = SHAPES[0]
    q, q_sink, kv, view, _ = some_step(shape, 0)
    empty = RingView(view.page.at[0].set(-1), view.slot, view.positions, view.valid, view.first_page.at[0].set(0))
    out = interpreted(shape)(q, q_sink, kv, empty, None)
    assert not np.asarray(out[0]).any()
    assert np.array_equal(out[1], interpreted(shape)(q, q_sink, kv, view, None)[1])


VOCAB, EMBED, ROWS = 60, 20, 3
# at degree 3 there is room for five of a key's eight components
MEMORY = MemoryConfig(layers=(0,), components=8, features=96, code_dim=32)


@functools.cache
def adapter(config: MemoryConfig = MEMORY) -> Adapter:
    mean, projection = np.zeros((1, EMBED)), np.zeros((1, EMBED, config.components))
    return make_adapter(
        config, VOCAB, mean, projection, np.ones(VOCAB), np.zeros(GATE_FEATURES), np.zeros(config.components + 1)
    )


def some_reading(tokens: int, degrees: list[int], seed: int) -> tuple[Any, ...]:
    """A memory of random numbers, settings of each row, and keys as `recall_memory.keys` makes them."""
    random = np.random.default_rng(seed)
    state = recall_state.init_state(MEMORY, ROWS, VOCAB)
    values = random.integers(-127, 128, state.weights.shape).astype(np.int8)
    scale = random.uniform(1e-3, 1.0, state.scale.shape).astype(np.float32)
    state = dataclasses.replace(state, weights=jnp.asarray(values), scale=jnp.asarray(scale))
    state = dataclasses.replace(state, seen=jnp.asarray(random.integers(0, 2, state.seen.shape), jnp.int8))
    chosen = dataclasses.replace(recall_state.init_settings(ROWS), degree=jnp.asarray(degrees, jnp.int32) - 1)
    key = random.standard_normal((ROWS, tokens, 2, MEMORY.components)).astype(np.float32)
    for row, degree in enumerate(degrees):
        key[row, :, :, adapter().halves[degree - 1] :] = 0.0
    key /= np.linalg.norm(key, axis=3, keepdims=True)
    return state, chosen, jnp.asarray(key.reshape(ROWS, tokens, -1))


@functools.cache
def scores() -> Any:
    return jax.jit(recall_memory.scores)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3), min_size=ROWS, max_size=ROWS), seeds)
def test_memory_reads_have_the_bits_of_xlas_and_are_the_definition(degrees: list[int], seed: int) -> None:
    tokens = 3
    state, chosen, key = some_reading(tokens, degrees, seed)
    with pytest.MonkeyPatch.context() as patch, INTERPRETED.scope():
        patch.setattr(mosaic_recall_features, "_EXACT", 40)  # several sums, the last of them shorter
        found = np.asarray(scores()(adapter(), state, chosen, key))
    assert np.array_equal(found, np.asarray(scores()(adapter(), state, chosen, key)))
    codes = np.asarray(adapter().codes.values, np.float64) / np.sqrt(MEMORY.code_dim)
    for row, degree in enumerate(degrees):
        half = adapter().halves[degree - 1]
        cut = np.asarray(key[row], np.float64).reshape(tokens, 2, -1)[:, :, :half].reshape(tokens, -1)
        phi = recall_reference.features(cut, degree)
        stored = np.asarray(state.weights[row], np.float64) * np.asarray(state.scale[row], np.float64)[:, None]
        out = phi @ stored[:, : phi.shape[1]].T
        # half a unit of every feature, and then of every number read out
        wide = np.zeros((tokens, stored.shape[1]), np.float32)
        wide[:, : phi.shape[1]] = phi
        unit, unit_out = (np.asarray(split_rows(x)[2]).max() for x in (wide, out.astype(np.float32)))
        bound = unit / 2 * np.abs(stored).sum(axis=1).max() + unit_out / 2
        seen = np.asarray(state.seen[row]) > 0
        assert np.abs(found[row] - out @ codes.T)[:, seen].max() <= 1.1 * bound * np.abs(codes).sum(axis=1).max()


@pytest.mark.parametrize("choice", [KernelChoice(), KernelChoice(cpu=False), INTERPRETED], ids=["C", "XLA", "Mosaic"])
def test_a_memory_read_is_its_reference_up_to_quantisation(choice: KernelChoice) -> None:
    state, chosen, key = some_reading(3, [1, 2, 3][:ROWS], 0)
    args = key, chosen.degree, state.weights, state.scale, adapter().factors, adapter().feature_weight
    wanted = np.asarray(recall_features.ref_read_out(*args))
    with choice.scope():
        found = jax.jit(lambda *args: recall_features.read_out(*args, adapter().halves))(*args)
    np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(wanted).max())


MODEL = ModelConfig(
    family="llama",
    vocab=VOCAB,
    embed=32,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ff=32,
    layers=(LayerConfig(rope=0, sliding_window=150),),
    ropes=(RopeConfig(base=1e4, dims=32),),
    context_length=512,
    norm_eps=1e-5,
)


@functools.partial(jax.jit, static_argnums=0)
def layer_output(config: ModelConfig, kv: LayerKV, view: RingView) -> jax.Array:
    """A random layer's output."""
    random = np.random.default_rng(0)
    size = config.heads * config.head_dim

    def matrix(outputs: int, inputs: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((outputs, inputs)).astype(np.float32) * inputs**-0.5)

    one, inner = jnp.ones(config.embed), config.embed
    qkv = matrix(size + 2 * config.kv_heads * config.head_dim, inner)
    absent = dict.fromkeys(field.name for field in dataclasses.fields(LayerParams))
    weights = {"qkv": qkv, "out": matrix(inner, size), "gate_up": matrix(64, inner), "down": matrix(inner, 32)}
    layer = LayerParams(**absent | weights | {"attn_norm": one, "ff_norm": one})  # type: ignore[arg-type]
    x = jnp.asarray(random.standard_normal((*view.positions.shape, config.embed)).astype(np.float32))
    step = step_view(config, [rope_table(rope) for rope in config.ropes], view)
    (output,), _ = run_layers(config, config.layers, [layer], [kv], x, step)
    return output


def test_a_model_attends_through_the_kernel() -> None:
    shape = Shape(rows=2, tokens=4, kv_heads=2, groups=2, dim=32, ring=4)
    _, _, kv, view, _ = some_step(shape, 0)
    wanted = layer_output(MODEL, kv, view)
    with INTERPRETED.scope():
        assert str(jax.make_jaxpr(layer_output, static_argnums=0)(MODEL, kv, view)).count("name=window_attention") == 1
        found = layer_output(MODEL, kv, view)
    np.testing.assert_allclose(found, wanted, atol=0.02)


def test_they_run_on_tpus_where_every_device_runs_a_program_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = init_layer_kv(1, 4, 2, 64, SINKS, "int8")
    assert not attention.uses_tpu_kernel(kv)
    assert not recall_features.uses_tpu_kernel(1)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert attention.uses_tpu_kernel(kv)
    assert recall_features.uses_tpu_kernel(1)
    assert not recall_features.uses_tpu_kernel(PAGE)
    assert not attention.uses_tpu_kernel(init_layer_kv(1, 4, 2, 64, SINKS, "float32"))
    assert not attention.uses_tpu_kernel(init_layer_kv(1, 4, 2, 80, SINKS, "int8"))
    taken = []

    def inside(x: jax.Array) -> jax.Array:
        taken.append(attention.uses_tpu_kernel(kv))
        return x

    with jax.set_mesh(Mesh(np.asarray(jax.devices()[:1]), ("model",), axis_types=(AxisType.Auto,))):
        assert not attention.uses_tpu_kernel(kv)
        whole = PartitionSpec()
        jax.make_jaxpr(jax.shard_map(inside, in_specs=whole, out_specs=whole))(jnp.zeros(()))
    assert taken == [True]
    with KernelChoice(tpu=False).scope():
        assert not attention.uses_tpu_kernel(kv)


@functools.cache
def described_tpu() -> SingleDeviceSharding:
    """One chip of a described machine: what libtpu compiles for without a TPU."""
    from jax.experimental import topologies

    return SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])


def placed(tree: Any) -> Any:
    """The tree's shapes on the described TPU."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=described_tpu()), tree)


MODELS = {
    "smollm2": {"kv_heads": 3, "groups": 3, "dim": 64},
    "gemma3-270m": {"kv_heads": 1, "groups": 4, "dim": 256},
    "llama3-8b": {"kv_heads": 8, "groups": 4, "dim": 128},
    "llama2-7b": {"kv_heads": 32, "groups": 1, "dim": 128},
}


@pytest.mark.tpu_backend
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(
    ("rows", "tokens", "sliding_window", "kept_pages"),
    [(8, 1, None, 0), (2, 4, 1024, 0), (1, 128, None, 0), (8, 1, None, 8)],
)
@pytest.mark.parametrize("nulls", [False, True])
def test_mosaic_compiles_attention_and_reads_the_ring_where_it_lies(
    model: dict[str, int], rows: int, tokens: int, sliding_window: int | None, kept_pages: int, nulls: bool
) -> None:
    shape = Shape(rows=rows, tokens=tokens, ring=16, sliding_window=sliding_window, kept_pages=kept_pages, **model)
    null_logit = jnp.zeros(shape.kv_heads * shape.groups) if nulls else None
    step = placed(jax.eval_shape(lambda: (*some_step(shape, 0), null_logit)))
    compiled = (
        jax.jit(lambda *args: window_attention.attention(*args[:4], shape.sliding_window, shape.scale, *args[4:]))
        .lower(*step)
        .compile()
    )
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    ring = rows * shape.ring * shape.kv_heads * PAGE * shape.dim
    assert not [line for line in text.splitlines() if f"s8[{rows},{shape.ring}" in line and " copy(" in line]
    # what XLA's program around the kernel needs in memory is queries and outputs, not a second ring
    assert compiled.memory_analysis().temp_size_in_bytes < ring + step[0].size * 4


@pytest.mark.tpu_backend
@pytest.mark.parametrize(("rows", "tokens"), [(8, 1), (2, 4), (1, 32)])
def test_mosaic_compiles_memory_reads(rows: int, tokens: int) -> None:
    config = MemoryConfig(layers=(0,))
    key = jax.ShapeDtypeStruct((rows, tokens, config.key_size), jnp.float32)
    state = jax.eval_shape(lambda: recall_state.init_state(config, rows, VOCAB))
    degree = jax.ShapeDtypeStruct((rows,), jnp.int32)
    compiled = (
        jax.jit(lambda *args: mosaic_recall_features.read_out(*args, adapter(config).halves))
        .lower(*placed((key, degree, state.weights, state.scale)))
        .compile()
    )
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < state.weights.size / 10
