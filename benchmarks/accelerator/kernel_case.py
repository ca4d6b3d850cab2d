"""What a kernel is checked with: arrays, and its definition on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from atlas_jax.kernels.kernel_choice import DEFAULT_KERNELS, KernelChoice

Pair = tuple[Any, Any]
"""What the kernel gives, and its definition: arrays, or trees of them that have the same leaves."""


@dataclass(frozen=True)
class KernelCase:
    """A kernel and how it is checked.

    Attributes:
      modules: of `atlas_jax.kernels`, that the case runs.
      run: makes both; of small arrays if its argument is true.
      tolerance: by how much of the definition's largest value the kernel may be off: int8 and bfloat16 terms have their own
        rounding.
      choice: which kernels it is traced with.
      platform: the only one whose devices can run it.
    """

    modules: tuple[str, ...]
    run: Callable[[bool], Pair]
    tolerance: float
    choice: KernelChoice = DEFAULT_KERNELS
    platform: str | None = None


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers, the same every time."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def on_cpu(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of arrays gives on the host, with products in full float32."""
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, function(*jax.tree.map(np.asarray, args)))
