"""What must hold whatever the numbers: causality, separate rows, changes of basis, hostile inputs, refused settings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import ConfigError
from atlas_jax.memory import (
    PRESETS,
    Features,
    MemoryRule,
    chunked,
    init_params,
    init_state,
    make_tokens,
    read,
    scan,
    step,
)
from tests.property.memory_support import HEADS, close, draw_params, draw_tokens, fresh, jit, preset, run_chunked

FEW = settings(max_examples=6, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31 - 1)
LENGTH = 8


def float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def hostile(kind: str, tokens):
    """Tokens that break careless code; the shapes stay the same."""
    v = {"huge values": 1e30, "tiny values": 1e-38}.get(kind, 1.0) * tokens.v
    factor = {"zero keys": 0.0, "huge keys": 1e30, "tiny keys": 1e-38}.get(kind, 1.0)
    q, k = factor * tokens.q, factor * tokens.k
    if kind == "repeated keys":
        k, v = np.broadcast_to(k[:, :1], k.shape), np.broadcast_to(v[:, :1], v.shape)
    if kind == "all zero":
        return jax.tree.map(np.zeros_like, tokens)
    if kind == "all gates open":
        gates = {name: np.ones_like(getattr(tokens, name)) for name in ("eta", "alpha", "theta", "gamma")}
        return dataclasses.replace(tokens, **gates)
    return dataclasses.replace(tokens, q=q, k=k, v=v)


HOSTILE = [
    "zero keys",
    "huge keys",
    "tiny keys",
    "huge values",
    "tiny values",
    "repeated keys",
    "all zero",
    "all gates open",
]


@pytest.mark.parametrize("name", PRESETS)
def test_causal_row_by_row_and_finite(name):
    rule = preset(name)

    @FEW
    @given(seed=SEEDS, cut=st.integers(1, LENGTH - 1))
    def check(seed, cut):
        params, tokens = float32(draw_params(rule, seed)), float32(draw_tokens(rule, seed, LENGTH))
        state = init_state(rule, params, (HEADS,))
        after, y = run_chunked(rule, params, state, tokens)
        other = float32(draw_tokens(rule, seed + 1, LENGTH))

        def mixed(a, b):
            a = a.copy()
            a[:, cut:] = b[:, cut:]
            return a

        _, changed = run_chunked(rule, params, state, jax.tree.map(mixed, tokens, other))
        np.testing.assert_array_equal(changed[:, :cut], y[:, :cut])  # the future does not reach back

        swapped = jax.tree.map(lambda a, b: np.stack([a[0], b[1]]), tokens, other)
        beside, y_beside = run_chunked(rule, params, state, swapped)
        np.testing.assert_array_equal(y_beside[0], y[0])  # nor does a row's neighbour
        rows = [jax.tree.map(lambda x: x[0], dataclasses.replace(s, phase=s.phase[None])) for s in (after, beside)]
        jax.tree.map(np.testing.assert_array_equal, *rows)

    check()
    params, tokens = float32(draw_params(rule, 0)), float32(draw_tokens(rule, 0, LENGTH))
    for kind in HOSTILE:
        state, y = run_chunked(rule, params, init_state(rule, params, (HEADS,)), hostile(kind, tokens))
        assert np.isfinite(y).all(), kind
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state)), kind


@pytest.mark.parametrize("name", ["atlas", "gated_deltanet", "mesa"])
def test_gradients_are_causal_separate_and_finite(name):
    rule = preset(name, memory="matrix", residual="none") if name == "atlas" else preset(name)

    def reading(params, tokens, weight):
        return jnp.sum(chunked(rule, params, init_state(rule, params, (HEADS,)), tokens)[1] * weight)

    gradient = jit(jax.grad(reading, argnums=(0, 1)))
    params, tokens = float32(draw_params(rule, 0)), float32(draw_tokens(rule, 0, LENGTH))
    for cut in (2, 5):
        weight = np.zeros_like(tokens.v)
        weight[0, :cut] = 1  # outputs of row 0 before `cut`
        _, by_token = gradient(params, tokens, weight)
        for leaf in jax.tree.leaves(by_token):
            assert not leaf[1].any()
            assert not leaf[0, cut:].any()
        assert by_token.v[0, :cut].any()
    for kind in ("zero keys", "repeated keys", "all zero", "huge keys"):
        for leaf in jax.tree.leaves(gradient(params, hostile(kind, tokens), np.ones_like(tokens.v))):
            assert np.isfinite(leaf).all(), kind


@pytest.mark.parametrize("name", ["deltanet", "swla", "omeganet"])
def test_a_change_of_basis_changes_nothing_else(name):
    """Keys turned by Q with W₀Qᵀ: same outputs. Values turned by R with R·W₀: outputs turned by R."""
    rule = preset(name, residual="none", features=Features())

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        with jax.enable_x64(True):
            params, tokens = draw_params(rule, seed), draw_tokens(rule, seed, LENGTH)
            rng = np.random.default_rng(seed)
            turn, twist = (np.linalg.qr(rng.standard_normal((3, 3)))[0] for _ in range(2))
            weights = dict(params.weights)
            first, last = ("w", "w") if rule.memory == "matrix" else ("w2", "w1")
            weights[first] = weights[first] @ turn.T
            weights[last] = twist @ weights[last]
            turned = dataclasses.replace(tokens, q=tokens.q @ turn.T, k=tokens.k @ turn.T, v=tokens.v @ twist.T)
            moved = dataclasses.replace(params, weights=weights)
            _, y = run_chunked(rule, params, fresh(rule, params), tokens)
            _, y_turned = run_chunked(rule, moved, fresh(rule, moved), turned)
            close(y_turned, y @ twist.T)

    check()


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("d_k", {"d_k": 0}),
        ("chunk", {"chunk": 0}),
        ("block", {"block": -1}),
        ("memory", {"memory": "tree"}),
        ("optimizer", {"optimizer": "adam"}),
        ("window", {"window": None}),
        ("window", {"optimizer": "exact"}),
        ("window", {"window": 0}),
        ("residual", {"residual": "key"}),
        ("residual", {"memory": "mlp", "residual": "key"}),
        ("residual", {"memory": "mlp", "residual": "features"}),
        ("gradient_at", {"gradient_at": "decayed"}),
        ("ns_per", {"ns_per": "chunk"}),
        ("ns_steps", {"optimizer": "muon", "ns_steps": -1}),
        ("ns_table", {"ns_table": "newton"}),
        ("per_channel", {"per_channel": ("beta",)}),
        ("per_channel", {"optimizer": "exact", "window": None, "per_channel": ("alpha",)}),
        ("clip", {"clip": 0.0}),
        ("clip", {"optimizer": "exact", "window": None, "clip": 1.0}),
        ("ridge", {"ridge": 0.0}),
        ("hidden", {"hidden": -1}),
        ("optimizer", {"optimizer": "exact", "window": None, "objective": "dot"}),
        ("features", {"features": "polynomial"}),
    ],
)
def test_a_refused_setting_is_named(field, wrong):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        MemoryRule(**{"d_k": 3, "d_v": 4} | wrong)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("kind", {"kind": "cubic"}),
        ("degree", {"kind": "polynomial", "degree": 4}),
        ("degree", {"kind": "exponential", "degree": 0}),
        ("width", {"kind": "polynomial", "width": 8}),
        ("width", {"kind": "random_exponential"}),
        ("compress", {"compress": "sketch", "width": 8}),
    ],
)
def test_refused_features_are_named(field, wrong):
    with pytest.raises(ConfigError, match=rf"^features\.{field}: "):
        Features(**wrong)


def test_a_sketch_too_narrow_is_refused():
    with pytest.raises(ConfigError, match=r"^features\.width: "):
        MemoryRule(d_k=8, d_v=8, features=Features(kind="polynomial", degree=3, compress="sketch", width=10))


@pytest.mark.parametrize("name", ["atlas", "atlas_pp", "omeganet"])
def test_presets_sketch_monomials_that_are_more_than_four_a_component(name):
    assert PRESETS[name](4, 4).features == Features(kind="polynomial", degree=2)
    assert PRESETS[name](5, 5).features == Features(kind="polynomial", degree=2, compress="sketch", width=20)


def test_wrong_shapes_are_named():
    rule = preset("swla", gates="age")
    good = float32(draw_tokens(rule, 0, LENGTH))
    params = init_params(rule, jax.random.key(0))
    for name in ("q", "v", "eta", "gamma"):
        bad = dataclasses.replace(good, **{name: getattr(good, name)[..., :-1]})
        for form in (chunked, step):
            with pytest.raises(ConfigError, match=rf"tokens\.{name}: "):
                form(rule, params, init_state(rule, params, (HEADS,)), bad)
    tokens = make_tokens(rule, good.q, good.k, good.v, eta=0.5)
    assert tokens.gamma.shape == (*good.k.shape[:-1], 3)
    assert float(tokens.eta[0, 0, 0]) == 0.5


def test_half_precision_goes_in_and_a_float32_state_comes_out():
    rule = preset("deltanet")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw_params(rule, 0))
    tokens = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw_tokens(rule, 0, LENGTH))
    state, y = run_chunked(rule, params, init_state(rule, params, (HEADS,)), tokens)
    assert {x.dtype for x in jax.tree.leaves((state.weights, y))} == {jnp.dtype(jnp.float32)}
    plain = float32(params)
    _, wanted = run_chunked(rule, plain, init_state(rule, plain, (HEADS,)), float32(tokens))
    close(y, wanted, 1e-6)


def test_no_tokens_change_nothing():
    rule = preset("titans")
    params = init_params(rule, jax.random.key(0))
    state = init_state(rule, params, (HEADS,))
    none = jax.tree.map(lambda x: x[:, :0], float32(draw_tokens(rule, 0, LENGTH)))
    after, y = chunked(rule, params, state, none)
    assert y.shape == (HEADS, 0, 3)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_scan_of_no_tokens_changes_nothing():
    rule = preset("deltanet")
    params = init_params(rule, jax.random.key(0))
    state = init_state(rule, params, (HEADS,))
    none = jax.tree.map(lambda x: x[:, :0], float32(draw_tokens(rule, 0, LENGTH)))
    after, y = scan(rule, params, state, none)
    assert y.shape == (HEADS, 0, 3)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_arguments_that_do_not_belong_together_are_named():
    """Before anything is computed, so that no product deep inside has to fail."""
    rule, other = preset("titans"), preset("deltanet")
    params, tokens = init_params(rule, jax.random.key(0)), float32(draw_tokens(rule, 0, LENGTH))
    state = init_state(rule, params, (HEADS,))
    strange = init_params(other, jax.random.key(0))
    wider = preset("titans", window=3)
    lone = jax.tree.map(lambda x: x[0, 0], tokens)
    by_head = init_params(rule, jax.random.key(0), (HEADS + 1,))
    cases = {
        r"tokens\.k: .*one token": (step, rule, params, state, tokens),
        r"tokens\.k: .*then tokens": (chunked, rule, params, state, lone),
        r"tokens\.k: .*\(5,\)": (scan, rule, params, init_state(rule, params, (5,)), tokens),
        r"params\.weights: ": (chunked, rule, strange, state, tokens),
        r"state\.weights: ": (chunked, rule, params, init_state(other, strange, (HEADS,)), tokens),
        r"state\.tail_k: ": (scan, rule, params, init_state(wider, params, (HEADS,)), tokens),
        r"state: .*heads": (chunked, rule, by_head, state, tokens),
    }
    for said, (form, *arguments) in cases.items():
        with pytest.raises(ConfigError, match=said):
            form(*arguments)
    for q in (tokens.q[..., :-1], tokens.q[:1], tokens.q[0, 0, 0]):
        with pytest.raises(ConfigError, match=r"^q: "):
            read(rule, params, state, q)
    taught = preset("titans", features=Features(kind="elementwise", degree=2))
    with pytest.raises(ConfigError, match=r"params\.features: "):
        chunked(taught, params, state, tokens)


@pytest.mark.parametrize(
    ("name", "gate"), [("deltanet", "alpha"), ("deltanet", "theta"), ("omeganet", "theta"), ("mesa", "eta")]
)
def test_a_gate_that_a_rule_ignores_is_refused(name, gate):
    rule, x = preset(name), np.ones((HEADS, LENGTH, 3), np.float32)
    assert not rule.uses(gate)
    with pytest.raises(ConfigError, match=f"^{gate}: this rule has none"):
        make_tokens(rule, x, x, x, **{gate: 0.5})
    with pytest.raises(ConfigError, match=r"^gamma: shape"):
        make_tokens(rule, x, x, x, gamma=np.ones(7))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.int32])
def test_gates_keep_their_numbers_whatever_the_keys_are(dtype):
    rule, x = preset("titans"), jnp.ones((HEADS, LENGTH, 3), dtype)
    tokens = make_tokens(rule, x, x, x, eta=0.1, alpha=0.999, theta=0.9, gamma=0.7)
    for name, value in {"eta": 0.1, "alpha": 0.999, "theta": 0.9, "gamma": 0.7}.items():
        np.testing.assert_array_equal(getattr(tokens, name), np.full((HEADS, LENGTH, 1), value, np.float32))
    assert tokens.k.dtype == dtype


MATRICES = {
    "delta rule": preset("deltanet"),
    "delta rule on stale gradients": preset("deltanet", chunk=4),
    "window on stale gradients": preset("deltanet", chunk=4, window=3),
    "window at the newest memory": preset("deltanet", window=3),
    "momentum": preset("deltanet", chunk=4, window=3, optimizer="momentum"),
    "degree 2": preset("deltanet", window=2, features=Features(kind="polynomial", degree=2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_no_key_grows_an_error_at_the_greatest_step(name):
    """η·λ < 1: the curvature that a chunk meets is never past λ, and is λ where all keys are the same."""
    rule = MATRICES[name]
    length = 12 * rule.chunk

    @FEW
    @given(seed=SEEDS, alike=st.booleans(), theta=st.sampled_from([0.0, 0.5, 0.95]))
    def check(seed, alike, theta):
        rng = np.random.default_rng(seed)
        params = init_params(rule, jax.random.key(0))
        k = rng.standard_normal((HEADS, 1 if alike else length, 3)).astype(np.float32)
        k = np.broadcast_to(k, (HEADS, length, 3))
        v = np.zeros((HEADS, length, 3), np.float32)
        tokens = make_tokens(rule, k, k, v, theta=theta if rule.uses("theta") else None)
        assert float(tokens.eta.max()) * rule.curvature < 1
        state = init_state(rule, params, (HEADS,))
        start = rng.standard_normal(state.weights["w"].shape).astype(np.float32)
        state = dataclasses.replace(state, weights={"w": start})
        after, _ = run_chunked(rule, params, dataclasses.replace(state, anchor=state.anchor and {"w": start}), tokens)
        size = np.linalg.norm(start, axis=(1, 2))
        assert np.all(np.linalg.norm(after.weights["w"], axis=(1, 2)) <= size * (1.0001 if theta == 0 else 1.5))

    check()
    x = np.ones((1, length, 3), np.float32)
    params = jax.tree.map(lambda w: w + 1.0, init_params(rule, jax.random.key(0)))
    tokens = make_tokens(rule, x, x, 0 * x, eta=1.2 / rule.curvature)
    _, y = run_chunked(rule, params, init_state(rule, params, (1,)), tokens)
    assert np.abs(y[0, -1]).max() > np.abs(y[0, rule.chunk]).max()  # past 1/λ an error does grow


@pytest.mark.parametrize("name", ["atlas", "atlas_pp", "omeganet", "titans"])
def test_presets_learn_and_stay_small_at_their_own_step(name):
    """As `make_tokens` has it by default, over the same few pairs again and again."""
    rule = PRESETS[name](8, 8)
    k, v = np.random.default_rng(0).standard_normal((2, 1, 4, 8)).astype(np.float32)
    k, v = (np.tile(x, (1, 64, 1)) for x in (k, v / np.linalg.norm(v, axis=-1, keepdims=True)))
    params = init_params(rule, jax.random.key(0))
    tokens = make_tokens(rule, k, k, v)
    _, y = run_chunked(rule, params, init_state(rule, params, (1,)), tokens)
    assert np.abs(y).max() < 5
    error = np.sum((y - v) ** 2, axis=-1)[0]
    assert error[-8:].mean() < 0.75 * error[:8].mean()
