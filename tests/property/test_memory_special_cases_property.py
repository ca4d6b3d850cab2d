"""Rules that other papers name, from those papers' own equations: the presets must be them exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.memory import PRESETS, Features, _exact, chunked, init_params, init_state, make_tokens
from tests.property.memory_support import close, draw_params, draw_tokens, expected, fresh, jit, preset, run_chunked

FEW = settings(max_examples=6, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31 - 1)
LENGTH = 9


@pytest.fixture(autouse=True, scope="module")
def _float64():
    with jax.enable_x64(True):
        yield


def case(rule, seed, w0=None):
    """Parameters, the rule's outputs, and one sequence's arrays: unit q, k, then v and scalar gates."""
    params, tokens = draw_params(rule, seed), draw_tokens(rule, seed, LENGTH)
    if w0 is not None:
        params.weights["w"] = jnp.full_like(params.weights["w"], w0)
    _, y = run_chunked(rule, params, fresh(rule, params), tokens)
    q, k, v = (np.asarray(x[0]) for x in (tokens.q, tokens.k, tokens.v))
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    gates = [np.asarray(x[0, :, 0]) for x in (tokens.eta, tokens.alpha, tokens.theta, tokens.gamma)]
    return params, y[0], q, k, v, *gates


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_delta_rules(name):
    rule = preset(name)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        params, y, q, k, v, eta, alpha, _, gamma = case(rule, seed)
        w = np.asarray(params.weights["w"])
        for t in range(LENGTH):
            beta = 2 * eta[t] * gamma[t]
            kept = alpha[t] if name == "gated_deltanet" else 1.0
            w = kept * w @ (np.eye(3) - beta * np.outer(k[t], k[t])) + beta * np.outer(v[t], k[t])
            close(y[t], w @ q[t])

    check()


def test_omeganet_of_a_matrix():
    """W_t = W_{t−1}(α_t I − 2η Σγφφᵀ) + 2η Σγvφᵀ with gradients always at the newest memory."""
    rule = preset("omeganet", memory="matrix", residual="none", clip=None, features=Features(), chunk=1, window=3)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        params, y, q, k, v, eta, alpha, _, gamma = case(rule, seed)
        w = np.asarray(params.weights["w"])
        for t in range(LENGTH):
            window = range(max(0, t - 2), t + 1)
            keys = sum(gamma[i] * np.outer(k[i], k[i]) for i in window)
            values = sum(gamma[i] * np.outer(v[i], k[i]) for i in window)
            w = w @ (alpha[t] * np.eye(3) - 2 * eta[t] * keys) + 2 * eta[t] * values
            close(y[t], w @ q[t])

    check()


@pytest.mark.parametrize("name", ["titans", "ttt_mlp"])
def test_deep_rules_by_automatic_differentiation(name):
    """Titans: S_t = θ S_{t−1} − η ∇ℓ(M_{t−1}), M_t = αM_{t−1} + S_t. TTT: M_t = M_b − Σ η ∇ℓ(M_b)."""
    rule = preset(name, chunk=1 if name == "titans" else 4)

    def memory(w, x):
        return x + w["w1"] @ jax.nn.gelu(w["w2"] @ x)

    gradient = jit(jax.grad(lambda w, k, v: jnp.sum((memory(w, k) - v) ** 2)))

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        params, y, q, k, v, eta, alpha, theta, gamma = case(rule, seed)
        weights = anchor = params.weights
        surprise = jax.tree.map(jnp.zeros_like, weights)
        for t in range(LENGTH):
            anchor = weights if t % rule.chunk == 0 else anchor
            step = eta[t] * gamma[t]
            kept, carried = (alpha[t], theta[t]) if name == "titans" else (1.0, 0.0)
            surprise = jax.tree.map(lambda s, g: carried * s - step * g, surprise, gradient(anchor, k[t], v[t]))  # noqa: B023
            weights = jax.tree.map(lambda w, s: kept * w + s, weights, surprise)  # noqa: B023
            close(y[t], memory(weights, q[t]))

    check()


@pytest.mark.parametrize("window", [1, 3])
def test_linear_attention_and_its_sliding_window(window):
    rule = preset("swla", window=window) if window > 1 else preset("linear_attention")

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        _, y, q, k, v, eta, alpha, _, gamma = case(rule, seed, w0=0.0)
        for t in range(LENGTH):
            total = np.zeros(3)
            for n in range(t + 1):
                kept = np.prod(alpha[n + 1 : t + 1]) if window > 1 else 1.0
                for i in range(max(0, n - window + 1), n + 1):
                    total += kept * eta[n] * gamma[i] * (k[i] @ q[t]) * v[i]
            close(y[t], total)

    check()


def test_one_gradient_step_from_zero_is_linear_attention():
    rule = preset("deltanet", chunk=16)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        _, y, q, k, v, eta, _, _, gamma = case(rule, seed, w0=0.0)
        close(y, np.tril(q @ k.T * (2 * eta * gamma)) @ v)

    check()


def test_exponential_features_make_softmax_attention():
    """With φ* the sums of values and of ones are softmax attention's numerator and denominator."""
    rule = preset("linear_attention", features=Features(kind="exponential", degree=8))

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        params, tokens = draw_params(rule, seed), draw_tokens(rule, seed, LENGTH)
        params.weights["w"] = jnp.zeros_like(params.weights["w"])
        ones = jnp.ones_like(tokens.eta)
        values = tokens.v.at[..., 2].set(1.0)
        tokens = type(tokens)(tokens.q, tokens.k, values, ones, ones, ones, ones)
        _, y = run_chunked(rule, params, fresh(rule, params), tokens)
        q, k = (np.asarray(x[0] / np.linalg.norm(x[0], axis=1, keepdims=True)) for x in (tokens.q, tokens.k))
        scores = np.where(np.tri(LENGTH) > 0, np.exp(q @ k.T), 0.0)
        close(y[0], scores @ values[0], 1e-4)
        attention = scores / scores.sum(axis=1, keepdims=True) @ values[0]
        close(y[0] / y[0, :, 2:], attention, 1e-4)

    check()


def test_mesa_is_recursive_least_squares():
    """Sherman and Morrison's recursion, which never forms the sums that the rule keeps."""
    rule = preset("mesa", retention="none")

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        params, y, q, k, v, _, _, _, gamma = case(rule, seed)
        w, p = np.asarray(params.weights["w"]), np.eye(3) / rule.ridge
        for t in range(LENGTH):
            gain = gamma[t] * p @ k[t] / (1 + gamma[t] * k[t] @ p @ k[t])
            w = w + np.outer(v[t] - w @ k[t], gain)
            p = p - np.outer(gain, k[t] @ p)
            close(y[t], w @ q[t], 1e-8)

    check()


def test_an_unbounded_window_solved_exactly_is_least_squares_and_its_capacity_is_the_rank():
    """Degree 2 in 3 variables has 10 monomials, 9 independent ones for unit keys: 9 pairs are recalled, 12 are not."""
    rule = preset("mesa", retention="none", features=Features(kind="polynomial", degree=2), ridge=1e-11)
    params, tokens = draw_params(rule, 0), draw_tokens(rule, 0, 12, extremes=False)
    params.weights["w"] = jnp.zeros_like(params.weights["w"])
    params.features["scale"] = jnp.ones(3)
    tokens = type(tokens)(tokens.k, tokens.k, tokens.v, *(jnp.ones_like(tokens.eta),) * 4)
    for count, recalled in ((9, True), (12, False)):
        part = jax.tree.map(lambda x: x[:, :count], tokens)  # noqa: B023
        state, _ = run_chunked(rule, params, fresh(rule, params), part)
        silent = jax.tree.map(lambda x: x[:, :count] * 0, tokens)  # noqa: B023
        silent = type(tokens)(part.q, part.k, part.v, silent.eta, 1 + silent.alpha, silent.theta, silent.gamma)
        _, y = run_chunked(rule, params, state, silent)
        error = float(jnp.max(jnp.abs(y - part.v)))
        assert (error < 0.01) == recalled, (count, error)


@pytest.mark.parametrize("iterations", [0, _exact.MAX_ITERATIONS])
@pytest.mark.parametrize("gates", [(0.97, 0.99), (0.3, 0.9)])
def test_mesa_is_exact_however_much_it_forgets(gates, iterations, monkeypatch):
    """In float32: conjugate gradients where they are enough, factors where they are not (or are all there is)."""
    monkeypatch.setattr(_exact, "MAX_ITERATIONS", iterations)
    dim, length = 24, 40
    rule = PRESETS["mesa"](dim, dim)
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, length, dim)).astype(np.float32)
    alpha = rng.uniform(*gates, (2, length, 1)).astype(np.float32)
    alpha[0, 25] = 0.0
    tokens = make_tokens(rule, *map(jnp.asarray, (q, k, v)), alpha=jnp.asarray(alpha), gamma=0.8)
    params = jax.tree.map(lambda x: 1 + jnp.asarray(x, jnp.float32), init_params(rule, jax.random.key(0)))
    y = jax.jit(lambda *args: chunked(rule, *args))(params, init_state(rule, params, (2,)), tokens)[1]
    wanted = expected(rule, jax.tree.map(lambda x: np.asarray(x, np.float64), params), tokens)
    np.testing.assert_allclose(y, wanted, rtol=2e-4, atol=2e-4 * np.abs(wanted).max())


SIZE, BLOCK, RIDGE = 10, 6, 0.1


def block_of_systems(rng, forgotten=1.0):
    """A block of `mesa`, as `_System` has it; a token in its middle keeps no more than `forgotten` of a history as large."""
    past, keys = rng.standard_normal((rng.choice([0, 15]), SIZE)), rng.standard_normal((BLOCK, SIZE))
    alpha, gamma = rng.uniform(0.6, 1.0, BLOCK), rng.random(BLOCK)
    alpha[3] *= forgotten
    gamma[1] = 0.0
    mixing = [[np.prod(alpha[n + 1 : t + 1]) * gamma[n] * (n <= t) for n in range(BLOCK)] for t in range(BLOCK)]
    return past.T @ past / forgotten, keys, np.cumprod(alpha), np.array(mixing), gamma


def solve_systems(system, right):
    """Each token's answer, and the matrices that they solve."""
    start, keys, kept, mixing, _ = system
    matrices = RIDGE * np.eye(SIZE) + kept[:, None, None] * start + np.einsum("tn,ni,nj->tij", mixing, keys, keys)
    return np.linalg.solve(matrices, right[..., None])[..., 0], matrices


def block_solver():
    """A function of its own: JAX keeps what it has compiled for one, and tests change what it calls."""
    rule = PRESETS["mesa"](SIZE, SIZE, ridge=RIDGE)
    return lambda system, right: _exact._solve_block(rule, _exact._System(*system), right)


def test_mesa_is_solved_by_conjugate_gradients_alone_where_little_is_forgotten(monkeypatch):
    """Queries of zero and at the ends of the range too, and tangents of all that a block is made of."""
    monkeypatch.setattr(_exact, "_solve_by_factors", lambda rule, system, right: jnp.full_like(right, jnp.nan))
    solver = block_solver()
    solve = jit(lambda at, way: jax.jvp(solver, at, way))

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        rng = np.random.default_rng(seed)
        system, right = block_of_systems(rng), rng.standard_normal((BLOCK, SIZE))
        way = jax.tree.map(lambda x: rng.standard_normal(x.shape), (system, right))
        way[0][0][:] += way[0][0].T
        ahead, behind = (
            solve_systems(*jax.tree.map(lambda x, d: x + step * d, (system, right), way))[0]  # noqa: B023
            for step in (1e-6, -1e-6)
        )
        length = np.array([[1.0], [1e-200], [1e200], [1.0], [0.0], [0.01]])
        x, change = solve((system, right * length), (way[0], way[1] * length))
        close(x / np.maximum(length, 1e-250), solve_systems(system, right)[0] * (length > 0))
        close(change / np.maximum(length, 1e-250), (ahead - behind) / 2e-6 * (length > 0), 1e-5)

    check()


@pytest.mark.parametrize("forgotten", [1.0, 1e-4])
def test_mesa_preconditioner_is_recursive_least_squares_from_the_start_of_the_block(forgotten):
    rule = PRESETS["mesa"](SIZE, SIZE, ridge=RIDGE)
    precondition = jit(lambda system, x: _exact._preconditioner(rule, _exact._System(*system))(x))

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        rng = np.random.default_rng(seed)
        system, x = block_of_systems(rng, forgotten), rng.standard_normal((BLOCK, SIZE))
        found = precondition(system, x)
        start, keys, kept, _, gamma = system
        kept = np.maximum(kept, 0.01)
        p = np.linalg.inv(start + RIDGE / max(kept[0] ** 3, 0.01) * np.eye(SIZE))
        for t in range(BLOCK):
            seen = p @ keys[t]
            p = p - gamma[t] * np.outer(seen, seen) / (kept[t] + gamma[t] * keys[t] @ seen)
            close(found[t], p @ x[t])

    check()


@pytest.mark.parametrize("iterations", [1, 6, 8])
def test_mesa_accepts_no_more_than_a_rounding_error_from_conjugate_gradients(iterations, monkeypatch):
    """Where they are stopped early and a token forgets nearly all, which leaves errors of every size."""
    monkeypatch.setattr(_exact, "MAX_ITERATIONS", iterations)
    solve = jit(block_solver())

    @FEW
    @given(seed=SEEDS, exponent=st.integers(-12, 0))
    def check(seed, exponent):
        rng = np.random.default_rng(seed)
        system, right = block_of_systems(rng, 10.0**exponent), rng.standard_normal((BLOCK, SIZE))
        x, (_, matrices) = np.asarray(solve(system, right)), solve_systems(system, right)
        left = np.linalg.norm(np.einsum("tij,tj->ti", matrices, x) - right, axis=1)
        size = np.trace(matrices, axis1=1, axis2=2) * np.linalg.norm(x, axis=1) + np.linalg.norm(right, axis=1)
        assert np.all(left <= 4e-15 * size)

    check()


def test_mesa_conjugate_gradients_stop_at_their_limit_and_leave_solved_rows_alone(monkeypatch):
    """An eigenvector is solved at once; three steps find the best x among right, A·right and A²·right."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    matrix = turn * np.linspace(100, 200, SIZE) @ turn.T
    right = np.stack([turn[:, 0], rng.standard_normal(SIZE)])
    arguments = (lambda x: x @ matrix, lambda x: 1e-16 * x, jnp.asarray(right))
    close(100 * _exact._conjugate_gradients(*arguments), 100 * np.linalg.solve(matrix, right.T).T, 1e-11)
    monkeypatch.setattr(_exact, "MAX_ITERATIONS", 3)
    space = np.stack([right[1], matrix @ right[1], matrix @ matrix @ right[1]], axis=1)
    best = space @ np.linalg.solve(space.T @ matrix @ space, space.T @ right[1])
    close(100 * _exact._conjugate_gradients(*arguments)[1], 100 * best)
