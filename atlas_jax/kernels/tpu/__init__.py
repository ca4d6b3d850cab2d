"""Mosaic kernels for TPUs: attention over int8 pages, the recall memory's features, Newton–Schulz and the Omega rule.

Like the C kernels of `kernels.cpu` they are an implementation, never a definition: on other platforms, and for shapes
they do not take, the same functions run as XLA programs. The operation's own file chooses.
"""

from __future__ import annotations

import jax

from atlas_jax.kernels import kernel_choice, lowering_platform

MATRIX_BYTES = 1 << 20
"""Bytes of a matrix up to which what is made of it fits in VMEM beside it."""


def usable() -> bool:
    """Whether a program that is traced now may use them."""
    choice, mesh = kernel_choice.chosen(), jax.sharding.get_abstract_mesh()
    here = choice.interpret_tpu or lowering_platform.platform() == jax.default_backend() == "tpu"
    # XLA cannot divide a kernel: on a mesh it runs where every device runs a program of its own (`jax.shard_map`)
    return choice.tpu and here and (mesh.empty or mesh.are_all_axes_manual)


def usable_undivided() -> bool:
    """The same of a program of arrays that anybody may have divided over devices: whether it surely runs on one."""
    return usable() and (jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty)


def interpreted() -> bool:
    """Whether they run interpreted, as XLA programs on any platform."""
    return kernel_choice.chosen().interpret_tpu
