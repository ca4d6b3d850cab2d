"""Typed reading of GGUF metadata, with errors that name the key, the type wanted and the type found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import numpy as np

from atlas_jax.gguf._header import GGUFError, quote

T = TypeVar("T", bool, int, float, str, list[str], np.ndarray)

_NAMES: dict[type, str] = {
    bool: "bool",
    int: "integer",
    float: "float",
    str: "string",
    list: "array of strings",
    np.ndarray: "numeric array",
}


def _checked(key: str, value: Any, kind: type[T]) -> T:
    # type() rather than isinstance: a bool is an int to Python, not to GGUF.
    if type(value) is kind:
        return value
    found = _NAMES.get(type(value), type(value).__name__)
    raise GGUFError(f"metadata key {quote(key)} is of type {found}, expected {_NAMES[kind]}")


def require(metadata: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """The value of a key that must be there.

    Args:
      kind: `bool`, `int`, `float`, `str`, `list` (of strings) or `numpy.ndarray` (of numbers).

    Raises:
      GGUFError: the key is missing, or of another type.
    """
    if key not in metadata:
        raise GGUFError(f"metadata key {quote(key)} is missing")
    return _checked(key, metadata[key], kind)


@overload
def get(metadata: Mapping[str, Any], key: str, kind: type[T]) -> T | None: ...
@overload
def get(metadata: Mapping[str, Any], key: str, kind: type[T], default: T) -> T: ...
def get(metadata: Mapping[str, Any], key: str, kind: type[T], default: T | None = None) -> T | None:
    """The value of a key, or `default` if the file does not have it.

    Raises:
      GGUFError: the key is there with another type.
    """
    return _checked(key, metadata[key], kind) if key in metadata else default
