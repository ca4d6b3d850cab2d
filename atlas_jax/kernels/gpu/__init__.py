"""Triton kernels for NVIDIA GPUs: products of few rows with weights in their stored bits.

Like the C kernels of `kernels.cpu` they are an implementation, never a definition. They are lowered for CUDA and interpreted
in tests and have not run on a GPU, so nothing takes them unless its `KernelChoice` says so.
"""

from __future__ import annotations

import jax

from atlas_jax.kernels import kernel_choice, lowering_platform


def usable() -> bool:
    """Whether a program that is traced now may use them, of arrays that nobody has divided over devices."""
    choice = kernel_choice.chosen()
    if not choice.gpu:
        return False
    return choice.interpret_gpu or (_is_cuda() and _undivided())


def interpreted() -> bool:
    """Whether they run interpreted, as XLA programs on any platform."""
    return kernel_choice.chosen().interpret_gpu


def _is_cuda() -> bool:
    if not lowering_platform.is_here():
        return lowering_platform.platform() == "cuda"
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version


def _undivided() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    # XLA cannot divide a kernel; without a mesh arrays may have been divided nevertheless
    if not mesh.empty:
        return bool(mesh.are_all_axes_manual)
    return not lowering_platform.is_here() or jax.device_count() == 1
