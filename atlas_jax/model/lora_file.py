"""LoRA adapters as llama.cpp's converter writes them: GGUF files with two thin matrices for each weight that they change."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atlas_jax.gguf import GGUFError, GGUFFile, get

MAX_RANK = 1024
_MAX_ALPHA = 1e6
_MAX_VALUE = 1e6
_A, _B = ".lora_a", ".lora_b"
_KEYS = frozenset({"adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", "adapter.lora.prompt_prefix"})
"""What an adapter may say of itself; the last two are words for people."""


class LoraError(ValueError):
    """An adapter that is none, or that cannot be used with the model; the message names the file and what is wrong."""


@dataclass(frozen=True)
class LoraPair:
    """What an adapter adds to one weight: `gain · b @ a`; of token embeddings `a` is [V, rank].

    Attributes:
      gain: alpha over the rank.
    """

    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]
    gain: float


@dataclass(frozen=True)
class LoraFile:
    """An adapter that was read.

    Attributes:
      name: of its file.
      digest: SHA-256 of its file.
      architecture: of the model it is for.
      pairs: by the name of the weight.
      alpha: 0 leaves the products as they are.
      task_name, prompt_prefix: what it says of itself, to people.
    """

    name: str
    digest: str
    architecture: str
    pairs: Mapping[str, LoraPair]
    alpha: float = 0.0
    task_name: str = ""
    prompt_prefix: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> LoraFile:
        """Reads an adapter.

        Raises:
          LoraError: it is damaged, hostile, no adapter, or of a kind that there is not.
          OSError: the file cannot be opened.
        """
        name = Path(path).name
        try:
            with GGUFFile.open(path) as file:
                architecture, alpha = _checked(file)
                names = _names(file)
                pairs = {weight: _pair(file, weight, alpha) for weight in names}
                words = [file.get(f"adapter.lora.{key}", str, "") for key in ("task_name", "prompt_prefix")]
                return cls(name, file.fingerprint(), architecture, pairs, alpha, *words)
        except (GGUFError, LoraError) as error:
            raise LoraError(f"LoRA adapter {name}: {error}") from None


def _checked(file: GGUFFile) -> tuple[str, float]:
    """The architecture it is for, and its alpha; 0 leaves scales as they are, as llama.cpp has it."""
    kind = get(file.metadata, "general.type", str)
    if kind != "adapter":
        raise LoraError(f"general.type is {kind!r}, not 'adapter'")
    kind = get(file.metadata, "adapter.type", str)
    if kind != "lora":
        raise LoraError(f"adapter.type is {kind!r}, not 'lora'")
    for key in sorted(file.metadata):
        if key.startswith("adapter.") and key not in _KEYS:
            raise LoraError(f"metadata '{key}' is not understood")
    alpha = get(file.metadata, "adapter.lora.alpha", float)
    alpha = 0.0 if alpha is None else alpha
    if not (math.isfinite(alpha) and abs(alpha) <= _MAX_ALPHA):
        raise LoraError(f"adapter.lora.alpha is {alpha}")
    return file.require("general.architecture", str), alpha


def _names(file: GGUFFile) -> Iterable[str]:
    """Names of the weights that it changes."""
    weights = dict[str, set[str]]()
    for name in file.tensors:
        weight, part = name[: -len(_A)], name[-len(_A) :]
        if part not in (_A, _B):
            raise LoraError(f"tensor '{name}' is not understood: neither '{_A}' nor '{_B}' of a weight")
        weights.setdefault(weight, set()).add(part)
    if not weights:
        raise LoraError("there are no tensors in it")
    for weight, parts in weights.items():
        for part in {_A, _B} - parts:
            raise LoraError(f"tensor '{weight}{part}' is missing")
    return weights


def _pair(file: GGUFFile, weight: str, alpha: float) -> LoraPair:
    a, b = file.tensor(weight + _A), file.tensor(weight + _B)
    for info in (a, b):
        if len(info.shape) != 2:
            raise LoraError(f"tensor '{info.name}' has shape {tuple(info.shape)}, which is no matrix's")
    rank = b.shape[1]
    if not 0 < rank <= MAX_RANK:
        raise LoraError(f"tensor '{b.name}' has rank {rank}, at most {MAX_RANK}")
    return LoraPair(_values(file, a.name), _values(file, b.name), alpha / rank if alpha else 1.0)


def _values(file: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    values = file.dequantize(name)
    if not (np.abs(values) <= _MAX_VALUE).all():
        raise LoraError(f"tensor '{name}' holds values that are not finite or far too large")
    return values
