"""Run by `test_optim_parallel.py` in a process of its own: jax must not have started before XLA_FLAGS is set."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from atlas_jax.optim import (
    GradientSharding,
    Training,
    average_gradients,
    local_training,
    mapped,
    muon,
    pmap_training,
    sharded_training,
)

jax.config.update("jax_enable_x64", True)  # so that equality is not blurred by rounding

AXES = {"layers": "lio: i -> o", "other": "io: i -> o", "in": "io: i -> o", "bias": None}
SHAPES = {"layers": (9, 6, 6), "other": (6, 6), "in": (4, 6), "bias": (6,)}


def optimizer(sharding: GradientSharding) -> optax.GradientTransformation:
    return muon(0.05, AXES, sharding=sharding)


def adam(sharding: GradientSharding) -> optax.GradientTransformation:
    return optax.chain(average_gradients(sharding), optax.adamw(0.05))


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    h = batch["x"] @ params["in"]
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w + params["bias"]), None), h, params["layers"])
    return jnp.mean((h @ params["other"] - batch["y"]) ** 2)


def run(training: Training) -> tuple[dict[str, jax.Array], list[float]]:
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(0.3 * rng.normal(size=s), jnp.float64) for k, s in SHAPES.items()}
    state = training.init(params)
    losses = []
    for _ in range(4):
        batch = {
            "x": jnp.asarray(rng.normal(size=(16, 4)), jnp.float64),
            "y": jnp.asarray(rng.normal(size=(16, 6)), jnp.float64),
        }
        state, value = training.step(state, batch)
        losses.append(float(value))
    assert int(np.max(state.step)) == 4
    return training.params(state), losses


def momentum_bytes(tree: object) -> list[int]:
    """Bytes of Muon's momentum on each device."""
    found = [0] * 8
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if "momentum" in jax.tree_util.keystr(path):
            for shard in leaf.addressable_shards:
                found[shard.device.id] += shard.data.nbytes
    return found


def main() -> None:
    assert len(jax.devices()) == 8
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for build in (optimizer, adam):
        one, one_losses = run(local_training(loss, build))
        trainings = [pmap_training(loss, build)]
        if build is optimizer:
            trainings.append(sharded_training(loss, build, mesh))
        for training in trainings:
            many, many_losses = run(training)
            np.testing.assert_allclose(many_losses, one_losses, rtol=1e-9)
            for name in SHAPES:
                np.testing.assert_allclose(many[name], one[name], atol=1e-9, err_msg=name)

    params = {k: jnp.zeros(s) for k, s in SHAPES.items()}
    # 10 matrices of 6×6 are padded to 16, one of 6×4 to 8: a device has 2 and 1 of them
    share = 8 * (2 * 36 + 1 * 24)
    for training in (pmap_training(loss, optimizer), sharded_training(loss, optimizer, mesh)):
        assert momentum_bytes(training.init(params)) == [share] * 8

    # what one step moves between devices: gradients are scattered, updates gathered, momentum stays
    inner = jax.pmap(
        lambda g: optimizer_update(g), axis_name="data", devices=jax.devices()
    )  # the optimiser alone, so that its communication stands alone
    text = inner.lower(jax.tree.map(lambda x: jnp.zeros((8, *x.shape)), params)).compile().as_text()
    gathered = [int(a) * int(b) * int(c) for a, b, c in re.findall(r"f64\[(\d+),(\d+),(\d+)\]\S* all-gather\(", text)]
    assert sorted(gathered) == [8 * 24, 16 * 36], gathered
    assert len(re.findall(r" reduce-scatter\(", text)) == 2, text
    print("equal")


def optimizer_update(gradient: dict[str, jax.Array]) -> dict[str, jax.Array]:
    tx = optimizer(mapped("data", 8))
    zero = jax.tree.map(jnp.zeros_like, gradient)
    return tx.update(gradient, tx.init(zero), zero)[0]


if __name__ == "__main__":
    main()
