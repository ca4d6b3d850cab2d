"""How far a sequence uses the LoRA adapters that are loaded: by their digests, so that what is stored is bound to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from atlas_jax.engine.api import SnapshotInvalid
from atlas_jax.typing import Float

LoraScales = tuple[tuple[str, float], ...]
"""Digest and scale of every adapter in use, ordered by digest; one at scale 0 is left out, for it changes nothing."""


def lora_scales(digests: Sequence[str], scales: Sequence[float]) -> LoraScales:
    """Scales of the loaded adapters in the form that sequences are compared in."""
    return tuple(sorted((digest, scale) for digest, scale in zip(digests, scales, strict=True) if scale))


def scales_of(lora: LoraScales, digests: Sequence[str]) -> Float[np.ndarray, "1 adapters"]:
    """The scales of one row, of which no adapter may be unknown."""
    found = dict(lora)
    return np.asarray([[found.get(digest, 0.0) for digest in digests]], np.float32)


def read_lora(header: Mapping[str, Any]) -> LoraScales:
    """What a stored session says of its adapters; raises SnapshotInvalid for what `lora_scales` would not have made."""
    try:
        found = msgspec.convert(header.get("lora", ()), LoraScales)
    except msgspec.ValidationError:
        raise SnapshotInvalid("snapshot's LoRA adapters cannot be read") from None
    if list(found) != sorted(dict(found).items()) or not all(scale and np.isfinite(scale) for _, scale in found):
        raise SnapshotInvalid("snapshot's LoRA adapters do not add up")
    return found


def check_loaded(used: Iterable[str], loaded: Sequence[str]) -> None:
    """Raises SnapshotInvalid for adapters that are not loaded; the message names the first by the start of its SHA-256."""
    for digest in used:
        if digest not in loaded:
            raise SnapshotInvalid(f"snapshot was made with LoRA adapter {digest[:16]}, which is not loaded")
