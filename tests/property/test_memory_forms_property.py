"""Every memory rule against the NumPy reference: token by token, chunkwise, and with a state carried over any split."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import ConfigError
from atlas_jax.memory import PRESETS, Features, MemoryRule, _memory, chunked, init_state, measure, read, scan
from tests.property.memory_support import (
    HEADS,
    at,
    close,
    draw_params,
    draw_tokens,
    expected,
    fresh,
    jit,
    preset,
    run_chunked,
    run_scan,
    run_step,
)
from tests.reference import memory_reference as reference

FEW = settings(max_examples=6, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31 - 1)
LENGTH = 11


@pytest.fixture(autouse=True, scope="module")
def _float64():
    with jax.enable_x64(True):
        yield


def variants() -> dict[str, MemoryRule]:
    """Rules that between them use every option the presets leave at its default."""
    return {
        "chunk longer than the text": preset("dla", chunk=16, features=Features(kind="polynomial", degree=3)),
        "gates by age, chunk 3": preset("omeganet", chunk=3, window=2, gates="age"),
        "window longer than the chunk": preset("omeganet", chunk=2, window=5),
        "anchor at every token, window": preset("omeganet", chunk=1),
        "anchor at every token, Muon": preset("atlas", chunk=1),
        "channels of an MLP": preset("atlas", per_channel=("eta", "alpha", "theta"), memory="gated_mlp", hidden=3),
        "channels of an MLP, dual form": preset(
            "titans", per_channel=("alpha", "theta"), memory="gated_mlp", gates="age", window=2
        ),
        "channels of a matrix": preset(
            "deltanet", chunk=4, per_channel=("eta", "alpha"), retention="decay", optimizer="momentum", window=2
        ),
        "Newton-Schulz per chunk": preset("atlas", ns_per="chunk", per_channel=("eta", "alpha"), gates="age"),
        "delta rule with momentum": preset("deltanet", optimizer="momentum", retention="decay", normalize=False),
        "decayed with momentum": preset("gated_deltanet", optimizer="momentum", step="inside"),
        "MLP without a residual": preset("ttt_mlp", residual="none"),
        "exact, gates by age": preset("mesa", gates="age"),
        "tight clip": preset("titans", clip=0.3, window=2),
        "Muon on a dot product, step inside": preset(
            "swla", optimizer="muon", step="inside", features=Features(kind="elementwise", degree=2)
        ),
        "Huber, elastic net": preset("titans", objective="huber(0.5)", retention="elastic_net(0.01)", window=2),
        "cubes of errors, a bounded memory": preset(
            "dla", objective="p_norm", retention="bounded(1.5)", activation="tanh", chunk=3
        ),
        "three layers, signs": preset("titans", memory="deep_mlp", optimizer="sign", chunk=2, activation="silu"),
        "norm inside the loss": preset("ttt_mlp", memory="norm_mlp", activation="relu", per_channel=("eta",)),
        "norm of a matrix, own coefficients": preset(
            "atlas", memory="norm_matrix", ns_table=((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
        ),
        "projection": preset(
            "titans",
            features=Features(kind="exponential", degree=2, compress="projection", width=3),
            residual="features",
        ),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_chunked_is_the_definition_from_any_token_on(name):
    rule = preset(name)

    @FEW
    @given(seed=SEEDS, split=st.integers(0, 6))
    def check(seed, split):
        params, tokens = draw_params(rule, seed), draw_tokens(rule, seed, LENGTH)
        wanted, state = expected(rule, params, tokens), fresh(rule, params)
        for t in range(
            split
        ):  # token by token up to the split, then a run that ends between two borders, then the rest
            state, y = run_step(rule, params, state, at(tokens, t))
            close(y, wanted[:, t])
        by_chunk, y = run_chunked(rule, params, state, at(tokens, slice(split, split + 5)))
        close(y, wanted[:, split : split + 5])
        for t in range(split, split + 5):
            state, y = run_step(rule, params, state, at(tokens, t))
            close(y, wanted[:, t])
        settled = [s if by_chunk.phase else dataclasses.replace(s, anchor={}) for s in (by_chunk, state)]
        jax.tree.map(close, *settled)  # at a border the old anchor no longer counts
        state = by_chunk
        for t in range(split + 5, LENGTH):
            state, y = run_step(rule, params, state, at(tokens, t))
            close(y, wanted[:, t])

    check()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("split", [3, 4])
def test_a_phase_that_is_known_while_tracing_changes_nothing(name, split):
    rule = preset(name)
    params, tokens = draw_params(rule, split), draw_tokens(rule, split, LENGTH)
    wanted, state = expected(rule, params, tokens), fresh(rule, params)
    for part in (slice(0, split), slice(split, LENGTH)):
        known = dataclasses.replace(state, phase=np.asarray(state.phase))
        run = jit(lambda params, tokens, known=known: chunked(rule, params, known, tokens))
        state, y = run(params, at(tokens, part))
        close(y, wanted[:, part])


@pytest.mark.parametrize("name", ["omeganet", "deltanet", "mesa"])
def test_scan_is_chunked(name):
    rule = preset(name)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        params, tokens = draw_params(rule, seed), draw_tokens(rule, seed, LENGTH)
        state = fresh(rule, params)
        by_token, y = run_scan(rule, params, state, tokens)
        by_chunk, y_chunk = run_chunked(rule, params, state, tokens)
        close(y, expected(rule, params, tokens))
        close(y_chunk, y)
        jax.tree.map(close, by_chunk, by_token)

    check()


FURTHER = ("cubes of errors, a bounded memory", "three layers, signs", "norm of a matrix, own coefficients")
"""Variants outside CI: each path they take is taken by another."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in FURTHER else ()) for name in variants()]
)
def test_variants_are_the_definition(name):
    rule = variants()[name]

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        params, tokens = draw_params(rule, seed), draw_tokens(rule, seed, LENGTH)
        wanted, state = expected(rule, params, tokens), fresh(rule, params)
        close(run_chunked(rule, params, state, tokens)[1], wanted)
        for t in range(LENGTH):
            state, y = run_step(rule, params, state, at(tokens, t))
            close(y, wanted[:, t])

    check()


MEASURED = {
    "window, clip": preset("titans", clip=0.3, window=2),
    "delta rule": preset("gated_deltanet"),
    "exact": preset("mesa"),
    "Newton-Schulz per chunk": variants()["Newton-Schulz per chunk"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "window, clip" else pytest.mark.slow) for name in MEASURED]
)
def test_what_a_memory_makes_of_its_tokens_is_the_references(name):
    """Loss and length of a token's gradient at the anchor, and whether it was clipped; nothing else changes."""
    rule = MEASURED[name]
    params, tokens = draw_params(rule, 3), draw_tokens(rule, 3, LENGTH, batch=1)
    state = fresh(rule, params, 1)
    _, y, found = jit(measure, static_argnums=0)(rule, params, state, tokens)
    close(y, run_chunked(rule, params, state, tokens)[1])
    memory = reference.Memory(dataclasses.replace(rule, clip=None), params.weights, params.features)
    real = reference.Memory(rule, params.weights, params.features)
    arrays = {f.name: np.asarray(getattr(tokens, f.name))[0] for f in dataclasses.fields(tokens)}
    for t in range(LENGTH):
        q, k, v, eta, alpha, theta, gamma = (arrays[n][t] for n in ("q", "k", "v", "eta", "alpha", "theta", "gamma"))
        before = {n: w.copy() for n, w in real.weights.items()}
        real.step(q, k, v, eta, alpha, theta, gamma)
        if rule.optimizer == "exact":
            error = real.regress(k) - v
            close(found.loss[0, t], np.sum(error**2))
            continue
        anchor = before if rule.chunk == 1 else real.anchor
        if rule.gradient_at == "decayed":
            anchor = {n: real.gated(n, w, alpha) for n, w in anchor.items()}
        grads = memory.gradient(anchor, k, v)
        norms = np.asarray([np.linalg.norm(g) for g in grads.values()])
        close(found.loss[0, t], reference.loss(rule.objective, memory.read(k, anchor), v))
        close(found.surprise[0, t], np.linalg.norm(norms))
        close(found.clipped[0, t], np.mean(norms > (rule.clip or np.inf)))


def test_surprise_has_a_gradient_where_there_is_no_error():
    """A matrix that starts at zero is asked for zero: length 0, whose slope is taken as 0."""
    rule = preset("deltanet")
    params, tokens = draw_params(rule, 7), draw_tokens(rule, 7, 4, batch=1)
    params.weights["w"] = jnp.zeros_like(params.weights["w"])
    state = fresh(rule, params, 1)

    def total(v):
        _, y, found = measure(rule, params, state, dataclasses.replace(tokens, v=v))
        return jnp.sum(y) + jnp.sum(found.surprise)

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.zeros_like(tokens.v))).all()


DOCUMENTS = {
    "window, momentum": preset("titans", window=3),
    "delta rule": preset("gated_deltanet"),
    "exact": preset("mesa"),
    "retention without a closed form": preset("dla", retention="elastic_net", window=2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "window, momentum" else pytest.mark.slow) for name in DOCUMENTS]
)
def test_documents_of_a_row_know_nothing_of_each_other(name):
    rule = DOCUMENTS[name]
    params, tokens = draw_params(rule, 5), draw_tokens(rule, 5, 20)
    borders = ((0, 4, 16), (0, 8, 12))
    starts = np.zeros((HEADS, 20), bool)
    for row, places in enumerate(borders):
        starts[row, list(places)] = True
    state = fresh(rule, params)
    by_chunk, y = jit(chunked, static_argnums=0, static_argnames="every")(
        rule, params, state, tokens, starts=starts, every=4
    )
    by_token, y_scan = run_scan(rule, params, state, tokens, starts=starts)
    for row, places in enumerate(borders):
        one = jax.tree.map(lambda x: x[row : row + 1], tokens)  # noqa: B023
        wanted = np.concatenate(
            [expected(rule, params, at(one, slice(a, b))) for a, b in zip(places, (*places[1:], 20), strict=True)],
            axis=1,
        )
        close(y[row], wanted[0])
        close(y_scan[row], wanted[0])
    jax.tree.map(close, *(dataclasses.replace(s, tail_k=0, tail_v=0) for s in (by_chunk, by_token)))
    with pytest.raises(ConfigError, match=r"^starts: has shape"):
        chunked(rule, params, state, tokens, starts=starts[:, :-1])
    with pytest.raises(ConfigError, match=r"^starts: the state"):
        chunked(rule, params, dataclasses.replace(state, phase=np.asarray(1, np.int32)), tokens, starts=starts)


SHORT = {
    "omeganet": preset("omeganet"),
    "chunks of two": preset("omeganet", chunk=2, window=5),
    "Newton-Schulz per chunk": variants()["Newton-Schulz per chunk"],
}


@pytest.mark.parametrize("name", SHORT)
def test_runs_shorter_than_a_chunk_begin_and_end_anywhere(name):
    """Also of no token at all, and where a chunk of padding follows."""
    rule = SHORT[name]
    params, tokens = draw_params(rule, 7), draw_tokens(rule, 7, 9)
    wanted = expected(rule, params, tokens)
    before = fresh(rule, params)
    for split in range(rule.chunk):
        for length in (0, 1, 2):
            state, y = run_chunked(rule, params, before, at(tokens, slice(split, split + length)))
            close(y, wanted[:, split : split + length])
            for t in range(split + length, 9):
                state, y = run_step(rule, params, state, at(tokens, t))
                close(y, wanted[:, t])
        before, _ = run_step(rule, params, before, at(tokens, split))


def test_read_is_what_a_step_would_have_read():
    by_chunk = preset("swla", optimizer="muon", ns_per="chunk")
    for rule, length in ((preset("omeganet"), 5), (preset("mesa"), 5), (by_chunk, 5), (by_chunk, 4)):
        params, tokens = draw_params(rule, 3), draw_tokens(rule, 3, 5)
        state, _ = run_chunked(rule, params, fresh(rule, params), at(tokens, slice(length)))
        silent = dataclasses.replace(
            at(tokens, 4), eta=0 * tokens.eta[:, 4], alpha=1 + 0 * tokens.alpha[:, 4], gamma=0 * tokens.gamma[:, 4]
        )
        queries = tokens.q[:, :4]
        found = jit(read, static_argnums=0)(rule, params, state, queries)
        for t in range(4):
            _, y = run_step(rule, params, state, dataclasses.replace(silent, q=queries[:, t]))
            close(found[:, t], y)
        by_two = jit(read, static_argnums=0)(rule, params, state, queries.reshape(HEADS, 2, 2, -1))
        close(by_two.reshape(found.shape), found)


@pytest.mark.parametrize("length", [1e-200, 1.0, 1e20])
def test_clip_at_any_length(length):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((4, 3)), rng.standard_normal((4, 5))
    left[1] = 0.0
    left[2] *= 0.01
    left[3, 1:] = 0.0
    size = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    wanted = left * np.minimum(1.0, 0.5 / np.maximum(size, 1e-9))[:, None]
    close(_memory._clip_left(left * length, right / length, 0.5) / length, wanted)


def test_heads_have_parameters_of_their_own():
    rule = preset("ttt_mlp", features=Features(kind="polynomial", degree=2))
    params = draw_params(rule, 0, heads=(3,))
    tokens = draw_tokens(rule, 0, 5, batch=6)
    split = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), tokens)
    _, y = run_chunked(rule, params, init_state(rule, params, (2,)), split)
    for head in range(3):
        own = jax.tree.map(lambda x: x[head], params)  # noqa: B023
        close(y[:, head], expected(rule, own, jax.tree.map(lambda x: x[:, head], split)))  # noqa: B023


GRADIENTS = {
    "atlas": preset("atlas", memory="matrix", residual="none"),
    "gated_deltanet": preset("gated_deltanet"),
    "mesa": preset("mesa"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_both_forms_agree(name):
    rule = GRADIENTS[name]

    def loss(form):
        def of(params, tokens, weight):
            state, y = form(rule, params, init_state(rule, params, (HEADS,)), tokens)
            return (y * weight).sum() + sum((x**2).sum() for x in jax.tree.leaves((state.weights, state.moments)))

        return jit(jax.grad(of, argnums=(0, 1)))

    by_chunk, by_token = loss(chunked), loss(scan)

    @settings(FEW, max_examples=3)
    @given(seed=SEEDS)
    def check(seed):
        params, tokens = draw_params(rule, seed), draw_tokens(rule, seed, 6, extremes=False)
        weight = np.random.default_rng(seed).standard_normal(tokens.v.shape)
        jax.tree.map(lambda a, b: close(a, b, 1e-7), by_chunk(params, tokens, weight), by_token(params, tokens, weight))

    check()


def test_training_memory_grows_slower_than_the_text():
    rule = PRESETS["deltanet"](6, 6, chunk=2, features=Features(kind="polynomial", degree=3))
    params = draw_params(rule, 0)

    def temporary(length: int) -> int:
        tokens = draw_tokens(rule, 0, length, batch=1)
        state = init_state(rule, params, (1,))
        grad = jax.grad(lambda p, t: chunked(rule, p, state, t)[1].sum(), argnums=(0, 1))
        return jit(grad).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(128), temporary(2048)
    state = 8 * sum(x.size for x in jax.tree.leaves(params.weights))
    assert long - short < 960 * state / 3  # one state for each of 960 chunks more would be three times that
