"""XLA settings that must be in the environment before jax is imported, and the self-test that guards them."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings

# jaxlib 0.10.2's CPU compiler silently miscompiles some fused reductions (jax issue 39103); with YNNPACK limited to
# single dots the reported case and our own shapes come out right. A user who set the flag keeps their choice.
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_AUTOTUNING_FLAG = "--xla_gpu_shard_autotuning"


def _set_xla_flags() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if _YNN_FLAG in flags:
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_YNN_FLAG}=individual_dot".strip()
    if _jax_has_started():
        warnings.warn(
            "atlas_jax was imported after jax had started, too late for an XLA flag without which jaxlib 0.10.2 computes "
            "some sums wrongly on CPU (jax issue 39103). Import atlas_jax before the first use of jax, or start with "
            f"XLA_FLAGS={_YNN_FLAG}=individual_dot.",
            RuntimeWarning,
            stacklevel=2,
        )


def _jax_has_started() -> bool:
    """Whether XLA has read its flags: with the first backend, not when jax is imported."""
    bridge = sys.modules.get("jax._src.xla_bridge")  # jax has no public name for it
    return bridge is not None and bridge.backends_are_initialized()


_set_xla_flags()


def limit_threads(threads: int) -> None:
    """Gives XLA's CPU client so many threads, if JAX has not run anything yet; 0 leaves it every core."""
    if threads > 0:
        os.environ["PJRT_NPROC"] = str(threads)  # read when JAX makes its CPU client


def compile_alone() -> None:
    """Has each of several processes choose the kernels of its GPU programs by itself.

    XLA lets processes share that work, and each then waits for the others to compile the same program; ours compile in orders
    of their own. To be called before JAX has run anything.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _AUTOTUNING_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_AUTOTUNING_FLAG}=false".strip()


@functools.cache
def limit_lapack() -> None:
    """Gives the LAPACK that XLA's CPU programs call, SciPy's OpenBLAS, one thread; NumPy's is another and stays.

    Its own threads go on spinning after a call, on the cores XLA needs next: an exact write took 55 ms with them and 34
    without (SmolLM2-135M's sizes, two cores, medians of two runs in turns).
    """
    from threadpoolctl import ThreadpoolController

    importlib.import_module("scipy.linalg")  # loads the library, as jaxlib does before its first LAPACK call
    for library in ThreadpoolController().lib_controllers:  # type: ignore[no-untyped-call]
        if library.internal_api == "openblas" and "scipy" in library.filepath:
            library.set_num_threads(1)


def self_test() -> None:
    """Runs the reported miscompilation and compares it with its exact answer.

    Raises:
      RuntimeError: this jaxlib with these flags computes wrong numbers; nothing should be served with it.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    rows = 32769
    values = np.stack([np.arange(rows), np.zeros(rows), np.zeros(rows)], axis=1).astype(np.float32)
    weight = jnp.eye(3, dtype=jnp.float32)
    squared = jax.jit(jax.vmap(lambda row: jnp.sum((weight @ row) ** 2)))(values)
    if not np.array_equal(np.asarray(squared), values[:, 0] ** 2):
        raise RuntimeError(
            "XLA's CPU compiler returns wrong results on this machine (jax issue 39103). Unset XLA_FLAGS, or set "
            f"XLA_FLAGS={_YNN_FLAG}=individual_dot, and start again."
        )
