"""What a family module provides, and how it reads metadata without letting any value pass unseen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._neutral import IGNORED_PREFIXES, NEUTRAL, WITHOUT_EXPERTS, WITHOUT_WINDOW

if TYPE_CHECKING:
    from atlas_jax.model.families._checkpoint import Checkpoint

_MAX_LAYERS = 1024
_MAX_HEADS = 1 << 16
_MAX_HEAD_DIM = 1 << 13
_MAX_SIZE = 1 << 24
_MAX_CONTEXT = (1 << 31) - 1
_MAX_ROPE_BASE = 1e15
_LEAST_EPS, _MAX_EPS = 1e-30, 0.1
_MAX_ROPE_FACTOR = 1e6


class UnsupportedModel(ValueError):
    """A GGUF that is well formed but asks for something this library does not compute; the message names it."""


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      architecture: `general.architecture` of its GGUF files, and the prefix of its metadata keys.
      models: which models are meant, for people.
      config: makes the model's configuration from its metadata and the sizes of its vocabulary.
      frequency_factors: whether the tensor `rope_freqs` divides its rotary frequencies.
      checkpoint: how Hugging Face ships its models; None reads GGUF files alone.
    """

    architecture: str
    models: str
    config: Callable[[Fields, Vocabulary], ModelConfig]
    frequency_factors: bool = False
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class Vocabulary:
    """How many tokens there are, and how many rows the embeddings have for them: as many, or some to pad."""

    tokens: int
    rows: int


class Fields:
    """Metadata of one architecture; every key must be taken by somebody or have a value that changes nothing.

    Any other key would be a model property silently ignored, so `finish` refuses it.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._prefix = f"{architecture}."
        self._values = {k.removeprefix(self._prefix): v for k, v in metadata.items() if k.startswith(self._prefix)}
        self._taken: set[str] = set()
        self.layers = self.integer("block_count", 1, _MAX_LAYERS)

    def integer(self, key: str, low: int, high: int = _MAX_SIZE, default: int | None = None) -> int:
        """A whole number from `low` to `high`; a list of one number for every layer is that number.

        Args:
          default: the value where the key is absent; None where it must be there.

        Raises:
          UnsupportedModel: it is missing, of another type, out of its range, or differs from layer to layer.
        """
        value = self._scalar(key)
        if value is None:
            return self._absent(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._refused(key, f"must be int, found {type(value).__name__}")
        if not low <= value <= high:
            raise self._refused(key, f"is {value}, not between {low} and {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`; otherwise as `integer`."""
        value = self._scalar(key)
        if value is None:
            return self._absent(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._refused(key, f"must be float, found {type(value).__name__}")
        if not low <= value <= high:  # nor is NaN
            raise self._refused(key, f"is {value:g}, not between {low:g} and {high:g}")
        return float(value)

    def flags(self, key: str) -> list[bool] | int | None:
        """One truth value for every layer, or a whole number (a period); None where the key is absent."""
        self._taken.add(key)
        value = self._values.get(key)
        if isinstance(value, np.ndarray):
            if value.shape != (self.layers,) or value.dtype != np.bool_:
                raise self._refused(key, f"must have {self.layers} truth values, one for every layer")
            return [bool(one) for one in value]
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_LAYERS):
            return value
        raise self._refused(key, f"must be a period or {self.layers} truth values")

    def head_dim(self, embed: int, heads: int, scale: float | None = None) -> int:
        """Numbers in a head: as the file says, or the width divided by the heads; even, for they are rotated in pairs.

        Args:
          scale: the factor on q·k of this family, if that is not the usual one.
        """
        divided = None if embed % heads else embed // heads
        dim = self.integer("attention.key_length", 1, _MAX_HEAD_DIM, default=divided or -1)
        if dim < 0:
            raise self._refused("attention.head_count", f"is {heads}, which does not divide embedding_length {embed}")
        if dim % 2:
            key = "attention.key_length" if "attention.key_length" in self._values else "attention.head_count"
            raise self._refused(key, f"makes heads of {dim} numbers, which are not pairs")
        self.same("attention.value_length", dim)
        self.same("attention.scale", 0.0, dim**-0.5 if scale is None else scale)
        return dim

    def rotated(self, head_dim: int, key: str = "rope.dimension_count", *, whole: bool = False) -> int:
        """Numbers of a head that rotate: all, or an even part of them unless that is `whole`."""
        dims = self.integer(key, 2, _MAX_HEAD_DIM, default=head_dim)
        if dims % 2 or dims > head_dim or (whole and dims != head_dim):
            raise self._refused(key, f"is {dims}, with heads of {head_dim} numbers")
        return dims

    def heads(self) -> tuple[int, int]:
        """Query heads, and the key heads that they share evenly."""
        heads = self.integer("attention.head_count", 1, _MAX_HEADS)
        shared = self.integer("attention.head_count_kv", 1, _MAX_HEADS, default=heads)
        if heads % shared:
            raise self._refused("attention.head_count_kv", f"is {shared}, which does not divide head_count {heads}")
        return heads, shared

    def context_length(self) -> int:
        """Tokens the model was trained on."""
        return self.integer("context_length", 1, _MAX_CONTEXT)

    def norm_eps(self) -> float:
        """What keeps a norm from dividing by zero, and must not outweigh what it divides."""
        return self.number("attention.layer_norm_rms_epsilon", _LEAST_EPS, _MAX_EPS)

    def rope_base(self, *keys: str, default: float | None = None) -> float:
        """Wavelength base of a rotary embedding, under the first of some keys that is there."""
        found = [self.number(key, 1.0, _MAX_ROPE_BASE) for key in keys if key in self._values]
        self._taken.update(keys)
        return found[0] if found else self._absent(keys[0], default)

    def rope_scale(self) -> float:
        """What positions are multiplied by: the inverse of a linear scaling factor."""
        factor = self.number("rope.scaling.factor", 0.0, _MAX_ROPE_FACTOR, default=0.0)
        # the key's name before there were types of scaling; read only without the new one
        old = self.number("rope.scale_linear", 0.0, _MAX_ROPE_FACTOR, default=0.0)
        factor = factor or old or 1.0
        kind = self._scalar("rope.scaling.type")
        # YaRN with nothing to scale is no scaling
        if kind not in (None, "linear", "none", "yarn") or (kind == "yarn" and factor != 1.0):
            raise self._refused("rope.scaling.type", f"has unsupported value {kind!r}")
        if kind == "none" and factor != 1.0:
            raise self._refused("rope.scaling.factor", f"is {factor:g}, but rope.scaling.type is 'none'")
        return 1.0 / factor

    def same(self, key: str, *allowed: float) -> None:
        """Takes a number that may be absent, or must be one of `allowed`."""
        value = self._scalar(key)
        if value is None:
            return
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not any(math.isclose(value, same, rel_tol=1e-6) for same in allowed):
            raise self._refused(
                key, f"has unsupported value {value!r}, not {' or '.join(f'{one:g}' for one in allowed)}"
            )

    def vocabulary(self, vocabulary: Vocabulary) -> int:
        """The number of tokens, after a look at whether the file contradicts itself."""
        self.integer("vocab_size", vocabulary.tokens, vocabulary.rows, default=vocabulary.tokens)
        return vocabulary.tokens

    def finish(self) -> None:
        """Refuses metadata of this architecture that nothing has taken and that would change the result."""
        experts, window = self._plain("expert_count", 0), self._plain("attention.sliding_window", 0)
        for key in sorted(set(self._values) - self._taken):
            if key.startswith(IGNORED_PREFIXES):
                continue
            if key == "expert_count" or (key in WITHOUT_EXPERTS and not experts):
                if key == "expert_count" and experts != 0:
                    raise self._refused(key, f"has unsupported value {experts!r}: mixtures of experts are not computed")
                continue
            if key in WITHOUT_WINDOW and not window and "attention.sliding_window" not in self._taken:
                continue
            if key not in NEUTRAL:
                raise self._refused(key, "is not understood")
            value = self._values[key]
            parts = value.tolist() if isinstance(value, np.ndarray) else [value]
            if not all(map(NEUTRAL[key], parts)):
                raise self._refused(key, f"has unsupported value {_short(value)}")

    def _plain(self, key: str, default: Any) -> Any:
        value = self._values.get(key, default)
        return (
            value.tolist()[0] if isinstance(value, np.ndarray) and value.size and (value == value[0]).all() else value
        )

    def _scalar(self, key: str) -> Any:
        """A value, or the one value that a list with an entry for every layer repeats."""
        self._taken.add(key)
        value = self._values.get(key)
        if not isinstance(value, list | np.ndarray):
            return value
        layers = 1 if key == "block_count" else self.layers
        if len(value) != layers:
            raise self._refused(key, f"is a list of {len(value)} values for {layers} layers")
        first = value[0] if isinstance(value, list) else value[0].item()
        if any(one != value[0] for one in value):
            raise self._refused(key, "differs from layer to layer, which is not supported")
        return first

    def _absent(self, key: str, default: Any) -> Any:
        if default is None:
            raise UnsupportedModel(f"metadata key '{self._prefix}{key}' is missing")
        return default

    def _refused(self, key: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"metadata key '{self._prefix}{key}' {why}")


def _short(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else text[:57] + "..."
