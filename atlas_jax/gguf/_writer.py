"""Writing GGUF files: metadata and float32 tensors, through the `gguf` package; a file appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGUFValueType, Keys, TokenType

from atlas_jax.gguf._header import MAX_DIMS, GGUFError

Value = bool | int | float | str | list[str] | list[int] | list[float]
_Key = Keys.Tokenizer

END_OF_TEXT = "<|endoftext|>"
BYTE_VOCAB = 257
"""Size of `byte_vocabulary`: ids 0 … 255 are bytes, 256 ends a text."""


def write_gguf(
    path: str | os.PathLike[str], metadata: Mapping[str, Value], tensors: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """Writes a file, over an older one of that name only once it is complete.

    Args:
      metadata: must have `general.architecture`; integers and floats are stored in 32 bits, lists hold strings
        or integers.
      tensors: stored as float32, bit for bit.

    Raises:
      GGUFError: no architecture, a tensor of more axes than the format has, or one that is not float32.
      OSError: the file cannot be written.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise GGUFError("metadata has no general.architecture")
    for name, values in tensors.items():
        if values.dtype != np.float32 or not 0 < values.ndim <= MAX_DIMS or values.size == 0:
            raise GGUFError(f"tensor {name!r} is {values.dtype} of shape {values.shape}, which is not written")
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        writer = GGUFWriter(temporary, architecture)
        for key, value in metadata.items():
            if key != "general.architecture":
                add_value(writer, key, value)
        for name, values in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(values))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def byte_vocabulary() -> dict[str, Value]:
    """Tokenizer metadata of a model trained on bytes: a byte-level vocabulary with nothing to merge."""
    texts = [_byte_text(byte) for byte in range(256)]
    return {
        _Key.MODEL: "gpt2",
        _Key.PRE: "default",
        _Key.LIST: [*texts, END_OF_TEXT],
        _Key.TOKEN_TYPE: [int(TokenType.NORMAL)] * 256 + [int(TokenType.CONTROL)],
        # the key must be there and GGUF writers drop empty lists; this rule makes no token, so it is never used
        _Key.MERGES: [f"{texts[0]} {texts[0]}"],
        _Key.BOS_ID: 256,
        _Key.EOS_ID: 256,
        _Key.ADD_BOS: False,
    }


def _byte_text(byte: int) -> str:
    """GPT-2's spelling of a byte: itself where that can be printed, else a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + sum(other not in printable for other in range(byte)))


def add_value(writer: GGUFWriter, key: str, value: Value) -> None:
    """Adds a key as `write_gguf` stores it."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _ if value and all(isinstance(item, int) for item in value):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.INT32)
        case _:
            writer.add_array(key, value)
