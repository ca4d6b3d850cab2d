"""What a family module provides, and how it reads metadata without letting any value pass unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from atlas_jax.config import ModelConfig

T = TypeVar("T")


class UnsupportedModel(ValueError):
    """A GGUF that is well formed but asks for something this library does not compute; the message names it."""


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      architecture: `general.architecture` of its GGUF files, and the prefix of its metadata keys.
      config: makes the model's configuration from its metadata and the size of its vocabulary.
    """

    architecture: str
    config: Callable[[Fields, int], ModelConfig]


class Fields:
    """Metadata of one architecture; every key must be taken by somebody.

    A key nobody took would be a model property silently ignored, so `finish` refuses it.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._prefix = f"{architecture}."
        self._values = {k.removeprefix(self._prefix): v for k, v in metadata.items() if k.startswith(self._prefix)}
        self._taken: set[str] = set()

    def take(self, key: str, kind: type[T]) -> T:
        """A required value; an int is welcome where a float is asked for.

        Raises:
          UnsupportedModel: it is missing or of another type.
        """
        value = self.take_optional(key, kind)
        if value is None:
            raise UnsupportedModel(f"metadata key '{self._prefix}{key}' is missing")
        return value

    def take_optional(self, key: str, kind: type[T]) -> T | None:
        """A value that may be absent (None)."""
        self._taken.add(key)
        value = self._values.get(key)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            found = type(value).__name__
            raise UnsupportedModel(f"metadata key '{self._prefix}{key}' must be {kind.__name__}, found {found}")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Takes a value that may be absent, or must be one of `allowed`."""
        self._taken.add(key)
        value = self._values.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedModel(f"metadata key '{self._prefix}{key}' has unsupported value {value!r}")

    def finish(self) -> None:
        """Refuses metadata of this architecture that nothing has taken."""
        left = sorted(set(self._values) - self._taken)
        if left:
            raise UnsupportedModel(f"metadata key '{self._prefix}{left[0]}' is not understood")
