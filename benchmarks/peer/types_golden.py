"""What llama.cpp makes of blocks of every type of tensor that it reads as numbers, as a golden file.

    PEER_PYTHON benchmarks/peer/types_golden.py --out tests/golden/peer/types.npz

Each type has NAME.packed, uint8 [rows, bytes] of seeded noise, and NAME.values, float32 [rows, 256]. PEER_PYTHON has
llama-cpp-python; `tests/gguf/test_gguf_types.py` compares.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

NUMBERS, ROWS = 256, 2
F32 = 0


class Traits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("numbers", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    random = np.random.default_rng(5)
    arrays = {}
    for kind in range(llama_cpp.GGML_TYPE_COUNT):
        traits = library.ggml_get_type_traits(kind).contents
        if kind != F32 and not traits.to_float:
            continue  # whole numbers, what is computed with alone, and types that are gone
        size = ROWS, NUMBERS // traits.numbers * traits.bytes
        packed = random.integers(0, 256, size, np.uint8)
        packed[: ROWS // 2] %= 60  # scales in half precision that are neither infinite nor no numbers
        values = packed.view(np.float32) if kind == F32 else np.empty((ROWS, NUMBERS), np.float32)
        if kind != F32:
            traits.to_float(packed.ctypes.data, values.ctypes.data, values.size)
        name = traits.name.decode().upper()
        arrays |= {f"{name}.packed": packed, f"{name}.values": values}
        print(kind, name)
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    main()
