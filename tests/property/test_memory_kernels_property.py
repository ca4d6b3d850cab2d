"""Feature maps, Newton–Schulz and the Omega kernel against their definitions."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.kernels import feature_maps, omega
from atlas_jax.kernels.monomials import polynomial_features
from atlas_jax.kernels.newton_schulz import COEFFICIENTS, SINGULAR_BAND, orthogonalize, ref_orthogonalize
from tests.property.memory_support import close, jit, reference

FEW = settings(max_examples=8, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True, scope="module")
def _float64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------------------------------------------- feature maps


@pytest.mark.parametrize(("dim", "degree"), [(1, 3), (4, 1), (3, 2), (3, 5)])
def test_polynomial_kernel_and_twins(dim, degree):
    fast, twin = jit(feature_maps.polynomial), jit(feature_maps.ref_polynomial)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((2, 5, dim))
        scale = rng.uniform(0, 1.5, degree + 1)
        phi = fast(x, scale)
        assert phi.shape[1] == feature_maps.monomial_count(dim, degree) == math.comb(dim + degree, degree)
        close(phi, twin(x, scale), 1e-6)  # the twin's table is in float32
        close(phi, [reference.monomials(row, scale**2) for row in x])
        close(phi @ fast(y, scale).T, sum(s**2 * (x @ y.T) ** i for i, s in enumerate(scale)))

    check()


@pytest.mark.parametrize(("dim", "degree"), [(3, 0), (5, 1), (8, 2), (17, 2), (10, 3)])
def test_blocks_of_monomials_are_projected_as_the_monomials_are(dim, degree):
    """With the slopes: an entry that repeats a monomial must take none."""
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((4, dim))
    scale = rng.uniform(0.5, 1.5, degree + 1)
    projection = rng.standard_normal((feature_maps.monomial_count(dim, degree), 3))

    def blocks(x, scale, projection):
        return feature_maps.polynomial_blocks(x, degree) @ feature_maps.projection_blocks(projection, scale, dim)

    def plain(x, scale, projection):
        return feature_maps.polynomial(x, scale) @ projection

    found, wanted = (
        jit(lambda *args, f=f: (f(*args), jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2))(*args)))
        for f in (blocks, plain)
    )
    jax.tree.map(close, found(x, scale, projection), wanted(x, scale, projection))


def test_blocks_of_monomials_are_the_products_that_keep_their_blocks_in_order():
    """Each once and no other: a repeat costs time, though it would be weighted by zero."""
    dim, degree = 17, 4
    x = np.random.default_rng(0).standard_normal((2, dim))
    wanted = []
    for order in range(degree + 1):
        factors = np.indices((dim,) * order).reshape(order, dim**order)
        kept = (np.diff(factors // feature_maps._BLOCK, axis=0) >= 0).all(axis=0)
        wanted.append(x[:, factors[:, kept]].prod(axis=1))
    close(feature_maps.polynomial_blocks(x, degree), np.concatenate(wanted, axis=1))


def test_polynomial_is_the_serving_map():
    x = np.random.default_rng(0).standard_normal((4, 3))
    scale = feature_maps.exponential_scale(3)
    close(feature_maps.polynomial(x, jnp.asarray(scale)), polynomial_features(x, tuple(scale**2)), 1e-6)


@pytest.mark.parametrize(("dim", "degree", "rank", "unit_rank"), [(4, 2, 15, 14), (3, 3, 20, 16), (5, 1, 6, 6)])
def test_monomials_have_full_rank_but_for_what_unit_length_takes(dim, degree, rank, unit_rank):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((80, dim))
    scale = jnp.asarray(feature_maps.exponential_scale(degree))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.linalg.matrix_rank(feature_maps.polynomial(x, scale)) == rank
    assert np.linalg.matrix_rank(feature_maps.polynomial(unit, scale)) == unit_rank
    assert np.linalg.matrix_rank(feature_maps.elementwise(x, scale[1:])) <= dim


def test_exponential_features_have_the_exponential_kernel():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 6, 3)) * 0.5
    features = jit(functools.partial(feature_maps.polynomial, scale=jnp.asarray(feature_maps.exponential_scale(8))))
    close(features(x) @ features(y).T, np.exp(x @ y.T), 1e-4)


@pytest.mark.parametrize("kind", ["sketch", "random"])
def test_random_features_are_unbiased(kind):
    """The mean over draws approaches the kernel as 1/√draws."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 4, 3))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) * np.array([[0.4], [0.6], [0.8], [1.0]]) for z in (x, y))
    scale = jnp.asarray([0.8, 1.3, 0.7, 0.5])
    if kind == "sketch":
        wanted = np.asarray(feature_maps.polynomial(x, scale) @ feature_maps.polynomial(y, scale).T)
        features = functools.partial(feature_maps.polynomial_sketch, scale=scale, width=200)
    else:
        wanted = np.exp(x @ y.T)
        features = functools.partial(feature_maps.random_exponential, width=400)
    found = np.stack([features(x, seed=s) @ features(y, seed=s).T for s in range(60)])
    assert features(x, seed=0).shape[1] in (200, 400)
    deviation = found.std(axis=0)
    assert np.all(np.abs(found.mean(axis=0) - wanted) < 4 * deviation / math.sqrt(60) + 1e-9)
    assert np.all(deviation < 0.8)


def test_sketch_features_are_shared_evenly_and_fill_the_width():
    for dim, degree, more in np.ndindex(4, 4, 6):
        dim, degree, width = dim + 1, degree + 2, dim + degree + 3 + more
        shares = feature_maps.sketch_shares(dim, degree, width)
        assert len(shares) == degree - 1
        assert 1 + dim + sum(shares) == width
        assert shares[0] - 1 <= shares[-1] > 0
        assert list(shares) == sorted(shares, reverse=True)
    for degree, width in ((3, 5), (1, 9)):
        with pytest.raises(ValueError, match="width"):
            feature_maps.sketch_shares(3, degree, width)


def test_elementwise_features_are_a_power_series_in_each_component():
    rng = np.random.default_rng(4)
    x, coefficients = rng.standard_normal((3, 5)), rng.standard_normal(4)
    wanted = sum(a * x ** (i + 1) for i, a in enumerate(coefficients))
    close(feature_maps.elementwise(x, coefficients), wanted)


MAPS = {
    "polynomial": functools.partial(feature_maps.polynomial, scale=np.ones(3)),
    "blocks": functools.partial(feature_maps.polynomial_blocks, degree=2),
    "sketch": functools.partial(feature_maps.polynomial_sketch, scale=np.ones(3), width=20, seed=0),
    "random": functools.partial(feature_maps.random_exponential, width=20, seed=0),
}


@pytest.mark.parametrize("name", MAPS)
def test_features_of_a_batch_are_those_of_each_row(name):
    x = np.random.default_rng(5).standard_normal((2, 3, 9))
    features = jit(MAPS[name])
    found = features(x)
    close(found.reshape(6, -1), features(x.reshape(6, 9)))
    close(found[1, 2], features(x[1, 2]))


# -------------------------------------------------------------------------------------------------- Newton–Schulz


@functools.cache
def _newton_schulz(table, steps=5):
    return jit(functools.partial(orthogonalize, table=table, steps=steps))


def with_singular_values(rng, shape, values):
    left = np.linalg.qr(rng.standard_normal((shape[0], len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], len(values))))[0]
    return left * values @ right.T


@pytest.mark.parametrize("table", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (3, 8)])
def test_newton_schulz(table, shape):
    run, twin = _newton_schulz(table), jit(functools.partial(ref_orthogonalize, table=table))

    @FEW
    @given(seed=SEEDS, rank=st.integers(1, 3), exponent=st.integers(-30, 30))
    def check(seed, rank, exponent):
        rng = np.random.default_rng(seed)
        values = rng.uniform(0.03, 1.0, rank)
        values /= np.linalg.norm(values)
        x = with_singular_values(rng, shape, values)
        result = np.asarray(run(x))
        found = np.linalg.svd(result, compute_uv=False)
        low, high = SINGULAR_BAND[table]
        assert np.all(found[:rank] >= low - 1e-3)
        assert np.all(found[:rank] <= high + 1e-3)
        assert np.all(found[rank:] < 1e-6)  # rank preserved
        close(result, twin(x), 1e-7)  # Gram form is the direct form
        close(run(-x), -result)
        close(run(x * 10.0**exponent), result)
        turn = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))[0]
        close(run(turn @ x), turn @ result, 1e-7)
        if table == "jordan":
            close(result, reference.newton_schulz(x, 5), 1e-7)

    check()


@pytest.mark.parametrize("shape", [(5, 3), (2, 4)])
def test_newton_schulz_of_a_batch_is_that_of_each_matrix(shape):
    x = np.random.default_rng(0).standard_normal((2, 3, *shape)) * np.array([1e-3, 1.0, 1e3])[:, None, None]
    close(_newton_schulz("jordan")(x), [[reference.newton_schulz(m, 5) for m in row] for row in x], 1e-7)


@pytest.mark.parametrize("table", COEFFICIENTS)
def test_stated_band_is_where_singular_values_go(table):
    assert len(COEFFICIENTS[table]) == 5
    sigma = np.exp(np.linspace(math.log(0.01), 0, 20_001))
    for a, b, c in COEFFICIENTS[table]:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    low, high = SINGULAR_BAND[table]
    assert low <= sigma.min() < low + 0.002
    assert high - 0.002 < sigma.max() <= high


def test_newton_schulz_repeats_its_last_row_and_takes_no_negative_steps():
    x = np.random.default_rng(0).standard_normal((3, 4))
    twin = jit(functools.partial(ref_orthogonalize, table="polar_express", steps=6))
    close(_newton_schulz("polar_express", 6)(x), twin(x), 1e-7)
    for steps in (4, 6, 7):
        wanted = reference.newton_schulz(x, steps, COEFFICIENTS["polar_express"])
        close(_newton_schulz("polar_express", steps)(x), wanted, 1e-7)
    close(_newton_schulz("jordan", 0)(x), x / np.linalg.norm(x))
    close(orthogonalize(x), _newton_schulz("jordan", 5)(x))  # the default
    with pytest.raises(ValueError, match="steps"):
        orthogonalize(x, steps=-1)


@pytest.mark.parametrize("shape", [(4, 4), (4, 5), (5, 2)])
def test_newton_schulz_gradient_is_that_of_the_definition(shape):
    rng = np.random.default_rng(0)
    x, along = rng.standard_normal((2, 3, *shape))
    slopes = (jax.grad(lambda x, f=f: (f(x, steps=3) * along).sum()) for f in (orthogonalize, ref_orthogonalize))
    close(*(jit(slope)(x) for slope in slopes), 1e-7)


def test_newton_schulz_at_zero_and_at_the_ends_of_float32():
    run = _newton_schulz("jordan", 2)
    grad = jit(jax.grad(lambda x: (orthogonalize(x, steps=2) ** 2).sum()))
    zero = jnp.zeros((3, 4), jnp.float32)
    assert not run(zero).any()
    assert not grad(zero).any()
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    for scale in (1e-36, 1e36):
        close(run(x * np.float32(scale)), run(x), 1e-4)
        assert np.isfinite(grad(x * np.float32(scale))).all()


# ----------------------------------------------------------------------------------------------------------- Omega


def gates(rng, rows, channels):
    x = rng.uniform(0, 1, (rows, channels))
    return np.where(rng.random(x.shape) < 0.2, np.round(x), x)


def test_window_band():
    band = jit(omega.window_band)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        rng = np.random.default_rng(seed)
        age, stored, valid = rng.random((5, 3)), rng.random(7), np.array([1.0, 1, 0, 1, 1])
        wanted = np.zeros((5, 7))
        for t in range(5):
            for i in range(t, t + 3):
                wanted[t, i] = age[t, t + 2 - i] * stored[i] * valid[t]
        close(band(age, stored, valid), wanted)

    check()


def test_decay_products():
    products = jit(omega.decay_products)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        rng = np.random.default_rng(seed)
        for size in (1, 2, 5):
            gate = gates(rng, size, 2)
            wanted = [[np.prod(gate[n + 1 : t + 1], axis=0) * (n <= t) for n in range(size)] for t in range(size)]
            close(products(gate), wanted)

    check()


def test_decay_products_and_their_slopes():
    """A product is linear in each gate, so its slope is the product of the others: also where a gate is zero."""
    slopes = jit(lambda gate, way: jax.jvp(omega.decay_products, (gate,), (way,))[1])

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        rng = np.random.default_rng(seed)
        gate, way = gates(rng, 5, 2), rng.standard_normal((5, 2))
        gate[rng.integers(5)] = 0.0
        wanted = np.zeros((5, 5, 2))
        for t, n, s in np.ndindex(5, 5, 5):
            if n < s <= t:
                others = [tau for tau in range(n + 1, t + 1) if tau != s]
                wanted[t, n] += way[s] * np.prod(gate[others], axis=0)
        close(slopes(gate, way), wanted)

    check()


def test_one_token_decays_by_nothing_also_in_the_slope_of_a_batch():
    """Rules with an anchor at every token are trained so: a batch of scans over chunks of one token."""

    def total(gate: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda done, g: (done + (g * omega.decay_products(g[None])).sum(), None), 0.0, gate)[0]

    slopes = jax.grad(lambda gate: jax.vmap(total)(gate).sum())(jnp.full((2, 3, 1), 0.5))
    close(slopes, np.ones((2, 3, 1)))


# gate channels of α, θ, the inner and the outer step (True: one per row or column), and tokens of the chunk and its tail
CHANNELS = {
    "one": ((False,) * 4, 5, 2),
    "all": ((True,) * 4, 5, 2),
    "alpha and outer": ((True, False, False, True), 5, 2),
    "alpha": ((True, False, False, False), 5, 2),
    "theta": ((False, True, False, False), 5, 2),
    "all, a chunk of one token": ((True,) * 4, 1, 0),
    "all, which are two": ((True,) * 4, 5, 2),
}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("axis", ["row", "column"])
def test_dual_form_is_the_recurrence(axis, channels):
    """Outputs, weights and momentum, and the weights of every token, of a chunk and its tail."""
    o, i = (2, 2) if "two" in channels else (4, 3)
    size = o if axis == "row" else i
    wide, chunk, tail = CHANNELS[channels]
    widths = [size if w else 1 for w in wide]

    def both(weight, momentum, x, left, right, alpha, theta, inner, outer, band):
        c = omega.chunk_coefficients(alpha, theta, inner, outer, band)
        y = omega.dual_product(x, weight, momentum, left, right, c, axis)
        w, s = omega.chunk_end(weight, momentum, left, right, c, axis)
        steps = omega.momenta(momentum, left, right, c, axis)
        each = omega.accumulate(weight, steps, alpha, outer, axis)
        full = [jnp.broadcast_to(g, (chunk, size)) for g in (alpha, theta, inner, outer)]
        twin = omega.ref_omega_chunk(weight, momentum, x, left, right, *full, band, axis)
        plain = omega.chunk_coefficients(alpha, None, inner, outer, band)
        without = omega.dual_product(x, weight, None, left, right, plain, axis)
        ends = omega.chunk_end(weight, None, left, right, plain, axis)
        full[1] = jnp.zeros_like(full[1])
        descent = omega.ref_omega_chunk(weight, 0 * momentum, x, left, right, *full, band, axis)
        formed = (jnp.einsum("toi,ti->to", each, x), each[-1], steps[-1])
        return (y, w, s), formed, twin, (without, *ends), descent

    compiled = jit(both)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        rng = np.random.default_rng(seed)
        weight, momentum = rng.standard_normal((2, o, i))
        x, left, right = (rng.standard_normal(s) for s in ((chunk, i), (chunk + tail, o), (chunk + tail, i)))
        band = np.tril(rng.random((chunk, chunk + tail)), tail)
        arrays = (weight, momentum, x, left, right, *(gates(rng, chunk, n) for n in widths), band)
        dual, formed, twin, plain, descent = compiled(*arrays)
        jax.tree.map(close, dual, twin)
        jax.tree.map(close, formed, twin)
        assert plain[2] is None
        jax.tree.map(close, plain[:2], descent[:2])
        outputs, *ends = zip(*recurrence(axis, *arrays), strict=True)
        jax.tree.map(close, dual, (np.stack(outputs), *(each[-1] for each in ends)))

    check()


@pytest.mark.parametrize("gain", ["ones", "alpha"])
@pytest.mark.parametrize("momentum", [True, False])
def test_sequential_errors_are_those_of_one_token_after_another(momentum, gain):
    """W_{t−1}·k_t − v_t, or α_t·W_{t−1}·k_t − v_t, with W from the errors before."""

    def errors(keys, values, weight, start, alpha, theta, inner, outer, gamma):
        c = omega.chunk_coefficients(alpha, theta if momentum else None, inner, outer, jnp.diag(gamma))
        by = alpha if gain == "alpha" else jnp.ones_like(alpha)
        return omega.sequential_errors(keys, values, weight, start if momentum else None, c, by)

    compiled = jit(errors)

    @FEW
    @given(seed=SEEDS)
    def check(seed):
        rng = np.random.default_rng(seed)
        keys, values, w, s = (rng.standard_normal(shape) for shape in ((6, 3), (6, 4), (4, 3), (4, 3)))
        alpha, theta, inner, outer = (gates(rng, 6, 1) for _ in range(4))
        gamma = rng.random(6)
        found = compiled(keys, values, w, s, alpha, theta, inner, outer, gamma)
        s = s if momentum else 0 * s
        for t in range(6):
            error = (alpha[t] if gain == "alpha" else 1.0) * w @ keys[t] - values[t]
            close(found[t], error)
            s = (theta[t] if momentum else 0.0) * s + inner[t] * gamma[t] * 2 * np.outer(error, keys[t])
            w = alpha[t] * w - outer[t] * s

    check()


def recurrence(axis, weight, momentum, x, left, right, alpha, theta, inner, outer, band):
    """Equations 32 and 33 without Newton–Schulz, token by token, in NumPy: each token's output, W and S."""
    for t in range(len(x)):
        side = (lambda g: g[t][:, None]) if axis == "row" else (lambda g: g[t][None, :])  # noqa: B023
        gradient = sum(band[t, i] * np.outer(left[i], right[i]) for i in range(len(left)))
        momentum = side(theta) * momentum + side(inner) * gradient
        weight = side(alpha) * weight - side(outer) * momentum
        yield weight @ x[t], weight, momentum
