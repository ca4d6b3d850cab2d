"""Run by `test_memory_devices.py` in a process of its own: jax must not have started before its devices are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atlas_jax.memory import MemoryRule, chunked, init_params, init_state, make_tokens, scan
from tests.property.memory_support import jit, preset

jax.config.update("jax_num_cpu_devices", 2)

RULES = {name: preset(name) for name in ("atlas", "titans", "deltanet", "mesa")}
WHOLE, ROWS, HEADS = P(), P("devices"), P(None, "devices")


def mesh(kind: AxisType) -> Mesh:
    return jax.make_mesh((2,), ("devices",), axis_types=(kind,))


def loss_of(rule: MemoryRule, form: Callable[..., Any] = chunked) -> Callable[..., jax.Array]:
    """Sum of squares of what a new memory reads: its state is the same on every device, its tokens are not."""

    def loss(params: Any, qkv: jax.Array) -> jax.Array:
        tokens = make_tokens(rule, *qkv)
        return jnp.sum(form(rule, params, init_state(rule, params, qkv.shape[1:2]), tokens)[1] ** 2)

    return loss


def arguments(rule: MemoryRule) -> tuple[Any, jax.Array]:
    params = init_params(rule, jax.random.key(0), (2,))  # two heads
    return params, jax.random.normal(jax.random.key(1), (3, 2, 2, 6, rule.d_k))  # q, k, v; rows; heads; tokens


def close(found: Any, wanted: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def divided(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Data-parallel training as `jax.shard_map` has it by default: slopes of what is on every device are summed by jax."""
    step = jax.value_and_grad(lambda params, qkv: jax.lax.psum(loss(params, qkv), "devices"))
    return jax.shard_map(step, mesh=mesh(AxisType.Auto), in_specs=(WHOLE, P(None, "devices")), out_specs=(WHOLE, WHOLE))


def explicit(rule: MemoryRule, spec: P, on: Mesh) -> tuple[Any, jax.Array]:
    """Arguments on a mesh whose axes are part of every type; the heads of parameters lie with those of the tokens."""
    params, qkv = arguments(rule)
    own = P(*spec[1:])
    return jax.device_put(params, NamedSharding(on, own)), jax.device_put(qkv, NamedSharding(on, P(None, *spec)))


def main() -> None:
    on = mesh(AxisType.Explicit)
    for rule in RULES.values():
        loss, (params, qkv) = loss_of(rule), arguments(rule)
        if rule.optimizer == "muon":  # takes longest to compile; types say whether it can be divided
            jax.eval_shape(divided(loss), params, qkv)
        else:
            close(jit(divided(loss))(params, qkv), jit(jax.value_and_grad(loss))(params, qkv))
        with jax.set_mesh(on):
            for spec in (ROWS, HEADS):
                jax.eval_shape(jax.jit(jax.value_and_grad(loss)), *explicit(rule, spec, on))
    rule = RULES["titans"]
    loss, (params, qkv) = loss_of(rule), arguments(rule)
    wanted = jit(jax.value_and_grad(loss))(params, qkv)
    jax.eval_shape(divided(loss_of(rule, scan)), params, qkv)
    with jax.set_mesh(on):
        close(jit(jax.value_and_grad(loss))(*explicit(rule, HEADS, on)), wanted)
    heads = NamedSharding(mesh(AxisType.Auto), P(None, None, "devices"))
    own = jax.device_put(params, NamedSharding(heads.mesh, P("devices")))
    close(jit(jax.value_and_grad(loss))(own, jax.device_put(qkv, heads)), wanted)
    rows = jax.pmap(jax.value_and_grad(loss), in_axes=(None, 1))(params, qkv[:, :, None])
    close(jax.tree.map(lambda x: x.sum(0), rows), wanted)
    print("equal")


if __name__ == "__main__":
    main()
