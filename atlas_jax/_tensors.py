"""A JSON header and named arrays in one safetensors file: the form of adapters, bigram tables and snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import safetensors
import safetensors.numpy

_KEY = "atlas"


class DamagedFile(ValueError):
    """The bytes are not such a file."""


def encode(header: Any, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Serialises arrays with a header that msgspec can encode."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(contiguous, metadata={_KEY: msgspec.json.encode(header).decode()})


def decode(data: bytes, kind: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Reads what `encode` wrote: the header as a `kind`, and the arrays, whose shapes and values nobody has checked.

    Raises:
      DamagedFile: it is something else, or its header is not a `kind`.
    """
    try:
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = msgspec.json.decode(data[8 : 8 + length])["__metadata__"]
        return msgspec.json.decode(metadata[_KEY], type=kind), arrays
    except (
        safetensors.SafetensorError,
        msgspec.MsgspecError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise DamagedFile("not a file of tensors with a header, or a damaged one") from error
