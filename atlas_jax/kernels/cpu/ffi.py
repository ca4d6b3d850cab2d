"""CPU kernels in C: int8 products, attention over int8 pages, and what is done with a vocabulary's scores, called inside jit.

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
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.kernels import lowering_platform
from atlas_jax.typing import Array, Bool, Float, Int8, Int32, UInt8

__all__ = [
    "attention",
    "available",
    "blend",
    "build",
    "compiler",
    "draw",
    "gated_linear",
    "greedy",
    "heads",
    "linear",
    "monomials",
    "normed_linear",
    "summed_linear",
    "takes_attention",
    "takes_codes",
    "takes_heads",
    "takes_linear",
    "takes_monomials",
    "takes_vocabulary",
    "use",
]

log = logging.getLogger("atlas.kernels")

MAX_ROWS = 128
"""Rows of a product that one call takes."""
MAX_TOKENS = 128
"""Tokens per row up to which our attention is."""
_PAGE = 128
_MAX_SINKS = 16
# Where an image of the server has them built, that needs no compiler then.
SHIPPED = Path(__file__).parent / "csrc"
_SOURCES = tuple(sorted(SHIPPED.glob("*.[ch]")))
# no contraction: a product and a sum that became one instruction would round differently from XLA's
_FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
_BUILD_SECONDS = 900.0
"""What the compiler may take, 1.4 s of an idle processor, before a start goes on without kernels: a process that has given up
decodes several times slower until it ends, and a first start on a busy machine is where that happened after a minute."""
_NEWS_SECONDS = 30.0
# XLA keeps compiled programs by the names they call: a changed kernel needs a changed name
_VERSION = hashlib.sha256(b"\0".join(source.read_bytes() for source in _SOURCES)).hexdigest()[:16]
_FILE = f"kernels-{_VERSION}.so"
_DIGEST = hashlib.sha256().digest_size
_TARGETS = (
    "linear",
    "normed_linear",
    "summed_linear",
    "gated_linear",
    "heads",
    "normed_heads",
    "attention",
    "greedy",
    "draw",
    "blend",
    "monomials",
    "rounded_monomials",
)

_wanted = True


def use(wanted: bool) -> None:
    """Says whether programs traced from now on may use the kernels (they may unless this says no)."""
    global _wanted
    _wanted = wanted


def takes_linear(inner: int, outputs: int) -> bool:
    """Whether `linear` takes weights of this shape here, with any number of rows: XLA's product would round differently."""
    return inner % 64 == 0 and outputs % 16 == 0 and _ready()


def takes_attention(tokens: int, page: int, dim: int, sinks: int) -> bool:
    """Whether `attention` takes a step of this shape here."""
    return tokens <= MAX_TOKENS and page == _PAGE and dim % 64 == 0 and sinks <= _MAX_SINKS and _ready()


def takes_heads(page: int, dim: int, half: int) -> bool:
    """Whether `heads` takes heads of this many dimensions, `half` of them first of a rotated pair, here."""
    return page == _PAGE and dim % 16 == 0 and half % 16 == 0 and _ready()


def takes_monomials(features: int) -> bool:
    """Whether `monomials` takes tables of this length here."""
    return features % 16 == 0 and _ready()


def takes_vocabulary() -> bool:
    """Whether `greedy` and `draw` can be called here."""
    return _ready()


def takes_codes(size: int) -> bool:
    """Whether `blend` takes codes of this many components here."""
    return size % 64 == 0 and _ready()


def linear(
    x: Float[Array, "*matrices rows inp"],
    weight: Int8[Array, "*matrices out inp"] | UInt8[Array, "out groups record"],
    weight_scale: Float[Array, "*matrices out"],
) -> Float[Array, "*matrices rows out"]:
    """x·Wᵀ of activations in the two terms of `linear.split_rows`, for one matrix or several, each with rows of its own.

    The weight may be that of a `linear.PackedArray`.
    """
    (product,) = _products("linear", (x,), weight, weight_scale)
    return product


def normed_linear(
    x: Float[Array, "rows inp"],
    gain: Float[Array, inp],
    eps: float,
    weight: Int8[Array, "out inp"] | UInt8[Array, "out groups record"],
    weight_scale: Float[Array, out],
) -> Float[Array, "rows out"]:
    """`fused.rms_norm` and `linear`."""
    (product,) = _products("normed_linear", (x,), weight, weight_scale, gain, eps=np.float32(eps))
    return product


def summed_linear(
    x: Float[Array, "rows inp"],
    added: Float[Array, "rows inp"],
    added_gain: Float[Array, inp] | None,
    gain: Float[Array, inp],
    eps: float,
    weight: Int8[Array, "out inp"] | UInt8[Array, "out groups record"],
    weight_scale: Float[Array, out],
) -> tuple[Float[Array, "rows out"], Float[Array, "rows inp"]]:
    """The sum of x and `added`, which is normed first if it has a gain, and `normed_linear` of it: the product, the sum."""
    rest = (gain,) if added_gain is None else (gain, added_gain)
    product, total = _products("summed_linear", (x, added), weight, weight_scale, *rest, eps=np.float32(eps))
    return product, total


def gated_linear(
    x: Float[Array, "rows 2*inp"],
    block: int,
    gelu: bool,
    weight: Int8[Array, "out inp"] | UInt8[Array, "out groups record"],
    weight_scale: Float[Array, out],
) -> Float[Array, "rows out"]:
    """`fused.gated` and `linear`; `block` a multiple of 16."""
    settings = {"block": np.int64(block), "gelu": np.int64(gelu)}
    (product,) = _products("gated_linear", (x,), weight, weight_scale, **settings)
    return product


def _products(
    name: str,
    rows: tuple[jax.Array, ...],
    weight: jax.Array,
    weight_scale: jax.Array,
    *rest: jax.Array,
    **settings: Any,
) -> tuple[jax.Array, ...]:
    """The product of any number of rows, as calls of as many as one takes, and of two arrays of rows also their sum."""
    calls: list[Sequence[jax.Array]] = []
    for first in range(0, rows[0].shape[-2], MAX_ROWS):
        x, *added = (array[..., first : first + MAX_ROWS, :] for array in rows)
        widths = weight_scale.shape[-1], *(array.shape[-1] for array in added)
        results = tuple(jax.ShapeDtypeStruct((*x.shape[:-1], width), jnp.float32) for width in widths)
        calls.append(_call(name, results, x, weight, weight_scale, *rest[:1], *added, *rest[1:], **settings))
    return tuple(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2) for parts in zip(*calls, strict=True))


def monomials(
    key: Float[Array, "B T R"],
    factors: Int32[Array, "degree M F"],
    weight: Float[Array, "degree M"],
    degree: Int32[Array, B],
    *,
    rounded: bool = False,
) -> Float[Array, "B T M"]:
    """`features.gather_monomials` with the tables of each row's degree; `rounded` gives bfloat16."""
    shape = jax.ShapeDtypeStruct((*key.shape[:2], factors.shape[1]), jnp.bfloat16 if rounded else jnp.float32)
    (out,) = _call("rounded_monomials" if rounded else "monomials", (shape,), key, factors, weight, degree)
    return out


def greedy(scores: Float[Array, "B V"]) -> tuple[Int32[Array, B], Float[Array, B]]:
    """The first of the best tokens of every row, and the logarithm of Σ exp(score)."""
    rows = scores.shape[:1]
    token, log_mass = _call(
        "greedy", (jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.float32)), scores
    )
    return token, log_mass


def draw(
    scores: Float[Array, "B V"],
    *,
    temperature: Float[Array, B],
    top_k: Int32[Array, B],
    typical_p: Float[Array, B],
    top_p: Float[Array, B],
    min_p: Float[Array, B],
    uniform: Float[Array, B],
) -> Int32[Array, B]:
    """A token for every row of a temperature above 0, as `uniform` says, from what the filters leave in this order."""
    shape = jax.ShapeDtypeStruct(top_k.shape, jnp.int32)
    (token,) = _call("draw", (shape,), scores, temperature, top_p, min_p, typical_p, uniform, top_k)
    return token


def blend(
    logits: Float[Array, "B T V"],
    found: Float[Array, "B T C"],
    codes: Int8[Array, "V C"],
    code_scale: Float[Array, V],
    seen: Int8[Array, "B V"],
    active: Bool[Array, "B T"],
    log_odds: Float[Array, B],
    gate: Float[Array, features],
) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
    """The mixture of model and memory as logits, and the gate; see `memory.recall.blend`.

    Args:
      found: what was read out of the memory; its products with the codes of seen tokens are their scores.
      active: where the memory takes part; elsewhere the logits come back as they are.
    """
    flat = logits.reshape(-1, logits.shape[-1])  # as `linear` made them: XLA copies what is reshaped between two calls
    whole = jax.ShapeDtypeStruct(flat.shape, jnp.float32)
    shapes = whole, jax.ShapeDtypeStruct(active.shape, jnp.float32), whole  # the last is room for scores
    args = flat, found, codes, code_scale, seen, active, log_odds, gate
    mixed, passed, _ = _call("blend", shapes, *args, in_place={0: 0})
    return mixed.reshape(logits.shape), passed


def heads(
    x: Float[Array, "B T K G+2 D"],
    gains: tuple[Float[Array, D], Float[Array, D]] | None,
    eps: float,
    rotary: Sequence[Float[Array, "B T half"]],
    near: Sequence[Float[Array, "B T half"]],
    slot: Int32[Array, B],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
    ring: tuple[Int8[Array, "B N K P D"] | Float[Array, "B N K P"], ...],
) -> tuple[
    Float[Array, "B T H D"], Float[Array, "B T H D"], tuple[Int8[Array, "B N K P D"] | Float[Array, "B N K P"], ...]
]:
    """Queries for the ring and for the sinks, and the ring with the step's keys and values; see `kernels.heads.enter`.

    Args:
      ring: values and scale of the keys, then of the values; changed in place.
    """
    batch, tokens, kv_heads, parts, dim = x.shape
    queries = jax.ShapeDtypeStruct((batch, tokens, kv_heads * (parts - 2), dim), jnp.float32)
    shapes = queries, queries, *(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in ring)
    args = x, *rotary, *near, slot, positions, valid, *ring
    in_place = {len(args) - len(ring) + i: 2 + i for i in range(len(ring))}
    if gains is None:
        q, q_sink, *written = _call("heads", shapes, *args, in_place=in_place)
    else:
        q, q_sink, *written = _call("normed_heads", shapes, *args, *gains, in_place=in_place, eps=np.float32(eps))
    return q, q_sink, tuple(written)


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
    shape = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    args = (q, q_sink, k, k_scale, v, v_scale, sink_k, sink_v, seen, sinks_seen, factor)
    (out,) = _call("attention", (shape,), *args)
    return out


def _call(
    name: str,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    *args: jax.Array,
    in_place: dict[int, int] | None = None,
    **settings: Any,
) -> Sequence[jax.Array]:
    return jax.ffi.ffi_call(f"atlas_{name}_{_VERSION}", shapes, input_output_aliases=in_place)(*args, **settings)


def _ready() -> bool:
    return _wanted and lowering_platform.is_here() and lowering_platform.platform() == "cpu" and available()


@functools.cache
def available() -> bool:
    """Whether there are kernels on this processor. The first call builds and registers them."""
    try:
        library = _library()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "No native kernels, decoding is several times slower until the next start, which tries again: %s", error
        )
        return False
    if not library.atlas_supported():
        log.info("This processor has no AVX-512 VNNI: XLA's own products are used")
        return False
    for name in _TARGETS:
        capsule = jax.ffi.pycapsule(getattr(library, f"atlas_{name}"))
        jax.ffi.register_ffi_target(f"atlas_{name}_{_VERSION}", capsule, platform="cpu")
    return True


def compiler() -> str | None:
    """The C compiler that `build` uses: what CC says, else cc, gcc or clang."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _library() -> ctypes.CDLL:
    """The kernels: those shipped with the sources if there are any, else from the cache folder, or where they cannot be kept
    from one that is gone afterwards.
    """
    if _is_whole(SHIPPED / _FILE):
        return ctypes.CDLL(str(SHIPPED / _FILE))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atlas-jax" / "native"
    if not _is_whole(folder / _FILE) and not _writable(folder):
        with tempfile.TemporaryDirectory() as here:
            return ctypes.CDLL(str(build(Path(here))))
    return ctypes.CDLL(str(build(folder)))


def _is_whole(file: Path) -> bool:
    """Whether a library is as it was built: half of one, as a full disk or a power cut leaves it, ends the process."""
    try:
        data = file.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def build(folder: Path) -> Path:
    """The kernels as a shared library in a folder that is as trusted as the code, compiled if this source is not there yet.

    Raises:
      OSError: there is no compiler, or the folder cannot be written.
      SubprocessError: the compiler fails.
    """
    target = folder / _FILE
    if _is_whole(target):
        return target
    program = compiler()
    if program is None:
        raise OSError("no C compiler (cc, gcc or clang)")
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        code = [str(source) for source in _SOURCES if source.suffix == ".c"]
        _run([program, *_FLAGS, "-I", jax.ffi.include_dir(), *code, "-o", name])
        with open(name, "r+b") as library:  # what follows a library's last section is not loaded
            library.write(hashlib.sha256(library.read()).digest())
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _run(command: Sequence[str]) -> None:
    """Runs the compiler, and says so while that takes long."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    with process:
        while True:
            try:
                _, said = process.communicate(timeout=_NEWS_SECONDS)
                break
            except subprocess.TimeoutExpired:
                waited = time.monotonic() - started
                if waited >= _BUILD_SECONDS:
                    os.killpg(process.pid, signal.SIGKILL)  # the compiler is several processes
                    raise
                log.warning(
                    "The native kernels are still being compiled after %.0f s; the start waits for them", waited
                )
    if process.returncode:
        log.warning("The C compiler said: %s", said.decode(errors="replace")[-2000:])
        raise subprocess.CalledProcessError(process.returncode, command[0])
