"""Builds, loads and registers the C kernels, once per source with the machine's own compiler.

They are an implementation, never a definition: without a compiler, or on a processor without AVX-512 VNNI, the same
functions run as XLA programs.
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
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from atlas_jax.kernels import kernel_choice, lowering_platform

log = logging.getLogger("atlas.kernels")

SHIPPED = Path(__file__).parent / "csrc"
"""The sources; where an image of the server also has them built, that needs no compiler then."""
_SOURCES = tuple(sorted(SHIPPED.glob("*.[ch]")))
# no contraction: a multiply and an add that became one instruction would round differently from XLA's
_FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
_BUILD_SECONDS = 900.0
"""What the compiler may take, 1.4 s of an idle processor, before a start goes on without kernels: a process that has given up
decodes several times slower until it ends, and a first start on a busy machine is where that happened after a minute."""
_NEWS_SECONDS = 30.0
# XLA keeps compiled programs by the names they call: a changed kernel needs a changed name
VERSION = hashlib.sha256(b"\0".join(source.read_bytes() for source in _SOURCES)).hexdigest()[:16]
_FILE = f"kernels-{VERSION}.so"
_DIGEST = hashlib.sha256().digest_size
_TARGETS = (
    "linear",
    "normed_linear",
    "summed_linear",
    "gated_linear",
    "qkv_rope_cache",
    "attention",
    "exchange_pairs",
    "kept_attention",
    "received_attention",
    "greedy",
    "draw",
    "blend",
    "monomials",
    "rounded_monomials",
)


def usable() -> bool:
    """Whether a program that is traced now may call them."""
    here = lowering_platform.is_here() and lowering_platform.platform() == "cpu"
    return kernel_choice.chosen().cpu and here and available()


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
        log.info("This processor has no AVX-512 VNNI: XLA's own GEMMs are used")
        return False
    for name in _TARGETS:
        capsule = jax.ffi.pycapsule(getattr(library, f"atlas_{name}"))
        jax.ffi.register_ffi_target(f"atlas_{name}_{VERSION}", capsule, platform="cpu")
    return True


@functools.cache
def pack() -> Callable[..., int]:
    """The function that codes rows of weights, see `weight_forms.pack_rows`; needs `available()`."""
    function = _library().atlas_pack
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (ctypes.c_int, pointer, pointer, number, number, ctypes.c_float, pointer, pointer)
    packed: Callable[..., int] = function
    return packed


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
