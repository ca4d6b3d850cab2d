"""The device: what it is, what it reaches, and what it should."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PEAKS = {
    "H200": (4800, 989),
    "H100 PCIe": (2000, 756),
    "H100": (3350, 989),
    "GH200": (4000, 989),
    "B200": (8000, 2250),
    "A100-SXM4-80GB": (2039, 312),
    "A100-PCIE-80GB": (1935, 312),
    "A100": (1555, 312),
    "L40S": (864, 362),
    "L4": (300, 121),
    "A10": (600, 125),
    "T4": (320, 65),
    "V100": (900, 125),
    "RTX 4090": (1008, 165),
    "TPU v4": (1228, 275),
    "TPU v5 lite": (819, 197),
    "TPU v5e": (819, 197),
    "TPU v5p": (2765, 459),
    "TPU v5": (2765, 459),
    "TPU v6 lite": (1640, 918),
    "TPU v6e": (1640, 918),
}
"""GB/s and bfloat16 TFLOP/s of a device as its maker states them, by a part of the name that JAX has for it; the first that
fits."""


def peak(kind: str) -> tuple[int, int] | None:
    """GB/s and TFLOP/s of a device, if they are known."""
    return next((figures for name, figures in PEAKS.items() if name.lower() in kind.lower()), None)


def seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """The least time of a call, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)


def copy_bandwidth(quick: bool) -> float:
    """Bytes per second that one device reads and writes in a large copy."""
    size = (16 << 20) if quick or jax.default_backend() == "cpu" else (1 << 30)
    whole = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    return 2 * size / seconds(lambda: add(whole))


def product_rate(quick: bool) -> float:
    """Operations per second of a bfloat16 product."""
    size = 512 if quick or jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), jnp.bfloat16)
    times = jax.jit(lambda x, y: x @ y)
    return 2 * size**3 / seconds(lambda: times(matrix, matrix))


def run(task: Any) -> None:
    """See `benchmarks.accelerator`."""
    device = jax.devices()[0]
    task.found("device", f"{jax.device_count()} × {device.device_kind} ({device.platform}), jax {jax.__version__}")
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        task.found("memory", f"{stats['bytes_limit'] / 2**30:.1f} GiB")
    known, bandwidth, rate = peak(device.device_kind), copy_bandwidth(task.quick), product_rate(task.quick)
    gigabytes, tera = bandwidth / 1e9, rate / 1e12
    shares = (
        ("", "")
        if known is None
        else (f", {gigabytes / known[0]:.0%} of its peak", f", {tera / known[1]:.0%} of its peak")
    )
    task.found("bandwidth of a copy", f"{gigabytes:.0f} GB/s{shares[0]}", bytes_per_second=bandwidth)
    task.found("bfloat16 product", f"{tera:.2f} TFLOP/s{shares[1]}", operations_per_second=rate)
