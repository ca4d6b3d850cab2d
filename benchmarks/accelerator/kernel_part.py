"""Every kernel, as this device runs it, against its definition on the host; and the bytes a second that products read."""

from __future__ import annotations

import traceback
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator import attention_cases, drawing_cases, product_cases
from benchmarks.accelerator.kernel_case import KernelCase

KERNELS: dict[str, KernelCase] = {**product_cases.CASES, **attention_cases.CASES, **drawing_cases.CASES}


def run(task: Any) -> None:
    """See `benchmarks.accelerator`."""
    for name, kernel in KERNELS.items():
        if kernel.platform in (None, jax.default_backend()):
            _check(task, name, kernel)
    product_cases.speed(task)


def _check(task: Any, name: str, kernel: KernelCase) -> None:
    try:
        with kernel.choice.scope():
            found, wanted = (jax.tree.leaves(one) for one in kernel.run(task.quick))
    except Exception:  # the next one may work
        task.found(name, traceback.format_exc(limit=-3)[-600:], ok=False)
        return
    off = 0.0
    for one, other in zip(found, wanted, strict=True):
        exact = np.asarray(other, np.float64)
        most = float(np.abs(np.asarray(one, np.float64) - exact).max()) / max(float(np.abs(exact).max()), 1e-30)
        off = max(off, most if np.isfinite(most) else np.inf)
    task.found(name, f"off by {off:.1e}, at most {kernel.tolerance:.0e}", ok=bool(off <= kernel.tolerance))
