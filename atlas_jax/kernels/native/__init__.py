"""CPU kernels in C (`kernels.c`): int8 products and attention over int8 pages, called inside jit.

They are built once with the machine's own compiler, and are an implementation, never a definition: without a compiler, on
a processor without AVX-512 VNNI, or for shapes they do not take, the same functions run as XLA programs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from atlas_jax.kernels import target
from atlas_jax.typing import Array, Bool, Float, Int8

__all__ = ["attention", "build", "level", "linear", "takes_attention", "takes_linear", "use"]

log = logging.getLogger("atlas.kernels")

MAX_ROWS = {1: 8, 2: 256}
"""Rows of int8 terms up to which our product is ahead of XLA's, by what the processor has: AVX-512 VNNI, or AMX too."""
MAX_TOKENS = 128
"""Tokens per row up to which our attention is."""
_PAGE = 128
_MAX_SINKS = 16
_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC")
_BUILD_SECONDS = 60
# XLA keeps compiled programs by the names they call: a changed kernel needs a changed name
_VERSION = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
_TARGETS = ("linear", "attention")

_wanted = True


def use(wanted: bool) -> None:
    """Says whether programs traced from now on may use the kernels (they may unless this says no)."""
    global _wanted
    _wanted = wanted


def takes_linear(rows: int, inner: int, outputs: int) -> bool:
    """Whether `linear` takes a product of this shape here."""
    return inner % 64 == 0 and outputs % 16 == 0 and _ready() and rows <= MAX_ROWS[level()]


def takes_attention(tokens: int, page: int, dim: int, sinks: int) -> bool:
    """Whether `attention` takes a step of this shape here."""
    return tokens <= MAX_TOKENS and page == _PAGE and dim % 64 == 0 and sinks <= _MAX_SINKS and _ready()


def linear(
    terms: Int8[Array, "terms inp"],
    scale: Float[Array, "rows 1"],
    weight: Int8[Array, "out inp"],
    weight_scale: Float[Array, out],
) -> Float[Array, "rows out"]:
    """x·Wᵀ of activations in one int8 term or two (the second ones, in units of 1/254, after the first)."""
    return _call("linear", (scale.shape[0], weight.shape[0]), terms, scale, weight, weight_scale)


def attention(
    q: Float[Array, "B T H D"],
    q_sink: Float[Array, "B T H D"],
    k: Int8[Array, "B N K P D"],
    k_scale: Float[Array, "B N K P"],
    v: Int8[Array, "B N K P D"],
    v_scale: Float[Array, "B N K P"],
    sink_k: Float[Array, "B K S D"],
    sink_v: Float[Array, "B K S D"],
    seen: Bool[Array, "B T N P"],
    sinks_seen: Bool[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H D"]:
    """Softmax attention over a ring of int8 pages and the sinks; see `kernels.attention.window_attention`."""
    factor = jnp.asarray(scale, jnp.float32)
    return _call("attention", q.shape, q, q_sink, k, k_scale, v, v_scale, sink_k, sink_v, seen, sinks_seen, factor)


def _call(name: str, shape: tuple[int, ...], *args: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call(f"atlas_{name}_{_VERSION}", jax.ShapeDtypeStruct(shape, jnp.float32))(*args)


def _ready() -> bool:
    return _wanted and target.is_here() and target.platform() == "cpu" and level() > 0


@functools.cache
def level() -> int:
    """What the kernels use of this processor: 0 nothing, 1 AVX-512 VNNI, 2 AMX too. The first call builds and registers."""
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("No native kernels, decoding is slower: %s", error)
        return 0
    found = int(library.atlas_supported())
    if found == 0:
        log.info("This processor has no AVX-512 VNNI: XLA's own products are used")
        return 0
    for name in _TARGETS:
        capsule = jax.ffi.pycapsule(getattr(library, f"atlas_{name}"))
        jax.ffi.register_ffi_target(f"atlas_{name}_{_VERSION}", capsule, platform="cpu")
    return found


def build() -> Path:
    """The kernels as a shared library, compiled if there is none of this source yet (1.4 s).

    It is kept in `$XDG_CACHE_HOME/atlas-jax/native`, which must be as trusted as the code.

    Raises:
      OSError: there is no compiler, or the folder cannot be written.
      SubprocessError: the compiler fails.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atlas-jax" / "native"
    target = folder / f"kernels-{_VERSION}.so"
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler (cc, gcc or clang)")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, "-I", jax.ffi.include_dir(), str(_SOURCE), "-o", name]
        subprocess.run(command, check=True, capture_output=True, timeout=_BUILD_SECONDS)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target
