"""Muon against optax's, against its definition, and on whatever axes a parameter keeps its matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.optim import MatrixAxes, muon, scale_by_muon, scale_by_shape

SHAPES = {"square": (4, 4), "wide": (3, 8), "tall": (9, 2), "heads": (2, 5, 3, 2), "bias": (7,)}
AXES = {"square": "io: i -> o", "wide": "oi: i -> o", "tall": "io: i -> o", "heads": "lehd: e -> hd", "bias": None}


def _tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def _optax_axes(params: optax.Params) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    numbers = optax.contrib.MuonDimensionNumbers
    return {
        "square": numbers(0, 1),
        "wide": numbers(1, 0),
        "tall": numbers(0, 1),
        "heads": numbers((1,), (2, 3)),
        "bias": None,
    }


@pytest.mark.parametrize(("nesterov", "rms"), [(True, None), (False, 0.2)])
def test_equals_optax(nesterov: bool, rms: float | None) -> None:
    ours = muon(0.02, AXES, nesterov=nesterov, rms=rms, weight_decay=0.1)
    theirs = optax.contrib.muon(
        0.02,
        nesterov=nesterov,
        consistent_rms=rms,
        weight_decay=0.1,
        muon_weight_dimension_numbers=_optax_axes,
        adam_weight_decay=0.0,
    )
    params = _tree(0)
    mine, reference = ours.init(params), theirs.init(params)
    both = jax.jit(lambda g, m, r, a, b: (ours.update(g, m, a), theirs.update(g, r, b)))
    a = b = params
    for step in range(3):
        (update, mine), (expected, reference) = both(_tree(step + 1), mine, reference, a, b)
        for name in AXES:
            if name != "bias":  # optax gives the rest Nesterov's Adam, we plain Adam
                np.testing.assert_allclose(update[name], expected[name], atol=2e-5, err_msg=name)
        a, b = optax.apply_updates(a, update), optax.apply_updates(b, expected)


def test_rest_is_adam() -> None:
    ours, adam = muon(0.02, AXES, adam_learning_rate=0.5), optax.adam(0.5)
    params = _tree(0)
    update, _ = jax.jit(ours.update)(_tree(1), ours.init(params), params)
    bias = {"bias": params["bias"]}
    expected, _ = adam.update({"bias": _tree(1)["bias"]}, adam.init(bias))
    np.testing.assert_allclose(update["bias"], expected["bias"], rtol=1e-6)


@settings(max_examples=8, deadline=None)
@given(st.permutations("abcd"), st.integers(1, 2), st.integers(1, 1), st.integers(0, 2**31))
def test_axes_round_trip(names: list[str], inputs: int, outputs: int, seed: int) -> None:
    spec = f"abcd: {''.join(names[:inputs])} -> {''.join(names[inputs : inputs + outputs])}"
    axes = MatrixAxes.parse(spec)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3, 4, 5)), jnp.float32)
    matrices = axes.to_matrices(x)
    assert matrices.shape[1:] == axes.fans(x.shape)
    np.testing.assert_array_equal(axes.from_matrices(matrices, x.shape), x)
    batch = "".join(n for n in "abcd" if n not in names[: inputs + outputs])
    wanted = jnp.einsum(f"abcd->{batch}{''.join(names[: inputs + outputs])}", x)
    np.testing.assert_array_equal(matrices.reshape(-1), wanted.reshape(-1))


@pytest.mark.parametrize(
    "spec", ["io", "io: i ->", "io: -> o", "ii: i -> o", "io: i -> x", "io: i -> i", "io: i, o -> o"]
)
def test_bad_axes_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="matrix axes"):
        MatrixAxes.parse(spec)


def test_wrong_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="3 axes"):
        scale_by_muon({"w": "bio: i -> o"}).init({"w": jnp.zeros((2, 2))})


def test_leaf_without_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="no matrix axes"):
        scale_by_muon({"w": None}).init({"w": jnp.zeros((2, 2))})


@jax.jit
def _first_step(gradient: jax.Array) -> jax.Array:
    tx = scale_by_muon()
    return tx.update(gradient, tx.init(gradient))[0]


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-12, 1e12), st.integers(0, 2**31))
def test_steps_do_not_depend_on_the_gradients_scale(scale: float, seed: int) -> None:
    gradient = jnp.asarray(np.random.default_rng(seed).normal(size=(6, 4)), jnp.float32)
    np.testing.assert_allclose(_first_step(gradient), _first_step(gradient * scale), atol=1e-4)


def test_zero_gradient_gives_zero_step() -> None:
    tx = optax.chain(scale_by_muon(), scale_by_shape())
    zero = {"w": jnp.zeros((3, 3))}
    update, _ = tx.update(zero, tx.init(zero))
    assert not update["w"].any()


def test_serves_an_inner_loop() -> None:
    """The memory's inner step: weights of a batch of memories, fitted inside `scan`."""
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.normal(size=(2, 6, 3)), jnp.float32)
    truth = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    tx = optax.chain(scale_by_muon("boi: i -> o"), optax.scale_by_schedule(lambda t: -1.0 / (1 + t)))

    def loss(w: jax.Array) -> jax.Array:
        return jnp.mean(jnp.einsum("boi,bni->bno", w - truth, keys) ** 2)

    def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple[jax.Array, optax.OptState], None]:
        w, state = carry
        update, state = tx.update(jax.grad(loss)(w), state)
        return (w + update, state), None

    start = jnp.zeros_like(truth)
    (w, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=60))()
    assert loss(w) < 0.02 * loss(start)
