"""Which kernels an engine's programs use."""

from __future__ import annotations

from atlas_jax.engine.config import EngineConfig
from atlas_jax.kernels.kernel_choice import KernelChoice


def kernels_of(config: EngineConfig) -> KernelChoice:
    """What these settings say, of which a platform takes its own."""
    alone = config.devices == 1  # neither C's functions nor Triton's kernels can be divided
    return KernelChoice(
        cpu=config.native_kernels and alone, tpu=config.native_kernels, gpu=config.gpu_kernels and alone
    )
