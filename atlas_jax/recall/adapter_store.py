"""Adapter files: what calibration found for one model, in a safetensors file bound to the model's fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import msgspec
import numpy as np

from atlas_jax import _tensors
from atlas_jax.config import ConfigError, MemoryConfig, ModelConfig
from atlas_jax.recall.adapter import GATE_FEATURES, Adapter, make_adapter

_VERSION = 4


class AdapterError(ValueError):
    """An adapter file that is damaged, or was made for another model; the message says which."""


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    model: str
    layers: list[int]
    components: int
    features: int
    code_dim: int


def encode(fingerprint: str, config: MemoryConfig, adapter: Adapter) -> bytes:
    """Serialises the calibrated part of an adapter; the rest follows from the configuration.

    Raises:
      AdapterError: a number is not finite: no memory could be read with it.
    """
    header = _Header(_VERSION, fingerprint, list(config.layers), config.components, config.features, config.code_dim)
    projection = np.asarray(adapter.projection, np.float32)
    numbers = {name: getattr(adapter, name) for name in ("mean", "token_weight", "gate", "cue")}
    for name, array in {**numbers, "projection": projection}.items():
        if not np.isfinite(np.asarray(array)).all():
            raise AdapterError(f"the adapter's '{name}' is not finite")
    # models whose states are large have projections that float16 alone could not hold
    exponent = np.frexp(np.abs(projection).max(axis=(1, 2)))[1].astype(np.int16)
    arrays: dict[str, np.ndarray] = {
        "mean": np.asarray(adapter.mean, np.float32),
        "projection": np.ldexp(projection, -exponent[:, None, None]).astype(np.float16),
        "exponent": exponent,
        "token_weight": np.asarray(adapter.token_weight, np.float16),
        "gate": np.asarray(adapter.gate, np.float32),
        "cue": np.asarray(adapter.cue, np.float32),
        "kept_weight": np.asarray(config.kept_weights, np.float32),
    }
    return _tensors.encode(header, arrays)


def decode(data: bytes, fingerprint: str, model: ModelConfig, *, max_window: int) -> tuple[MemoryConfig, Adapter]:
    """Reads an adapter for a model.

    Raises:
      AdapterError: it is damaged or made for another model.
    """
    try:
        header, arrays = _tensors.decode(data, _Header)
    except _tensors.DamagedFile as error:
        raise AdapterError("adapter file is damaged") from error
    if header.version != _VERSION:
        raise AdapterError(f"adapter version {header.version} is not supported")
    if header.model != fingerprint:
        raise AdapterError("adapter was made for another model")
    try:
        config = MemoryConfig(
            layers=tuple(header.layers),
            components=header.components,
            features=header.features,
            code_dim=header.code_dim,
            max_window=max_window,
            kept_weights=_kept_weights(arrays, model),
        )
    except ConfigError as error:
        raise AdapterError(f"adapter file: {error}") from error
    count = len(config.layers)
    wanted = {
        "mean": (count, model.embed),
        "projection": (count, model.embed, config.components),
        "exponent": (count,),
        "token_weight": (model.vocab,),
        "gate": (GATE_FEATURES,),
        "cue": (config.components + 1,),
    }
    for name, shape in wanted.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or not np.isfinite(array).all():
            raise AdapterError(f"adapter file: '{name}' is missing or not {list(shape)} finite numbers")
    exponent = arrays["exponent"].astype(np.int32)[:, None, None]
    projection = np.ldexp(arrays["projection"].astype(np.float32), exponent)
    if not np.isfinite(projection).all():
        raise AdapterError("adapter file: 'exponent' is out of range")
    if not all(0 <= layer < len(model.layers) for layer in config.layers):
        raise AdapterError("adapter file names layers the model does not have")
    adapter = make_adapter(
        config,
        model.vocab,
        arrays["mean"].astype(np.float32),
        projection,
        arrays["token_weight"].astype(np.float32),
        arrays["gate"].astype(np.float32),
        arrays["cue"].astype(np.float32),
    )
    return config, adapter


def _kept_weights(arrays: Mapping[str, np.ndarray], model: ModelConfig) -> tuple[float, ...]:
    """Shares of the layers of kept pairs, or none where nobody has measured them."""
    weights = arrays.get("kept_weight")
    if weights is None or weights.shape not in ((0,), (len(model.layers),)):
        raise AdapterError(f"adapter file: 'kept_weight' is missing or not {len(model.layers)} numbers")
    return tuple(weights.astype(np.float64).tolist())


def shipped(fingerprint: str) -> bytes | None:
    """The adapter that comes with the library for a model, or None."""
    file = shipped_path(fingerprint)
    return file.read_bytes() if file.is_file() else None


def shipped_path(fingerprint: str) -> Path:
    """Where the library keeps the adapter it ships for a model."""
    return Path(str(resources.files("atlas_jax.recall"))) / "adapters" / f"{fingerprint[:16]}.safetensors"


def calibration_texts() -> list[str]:
    """The texts that come with the library for calibration; sources and licences in NOTICE beside them."""
    folder = resources.files("atlas_jax.recall") / "texts"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name)
    return [file.read_text("utf-8") for file in files]


def probe_filler() -> str:
    """Prose that comes with the library, to use as a haystack."""
    return (resources.files("atlas_jax.recall") / "texts" / "prose.txt").read_text("utf-8")


def cached(folder: Path, fingerprint: str, dim: int) -> Path:
    """Where an adapter calibrated on this machine is kept; models have one for every dimension of keys that was asked for."""
    return folder / f"{fingerprint[:32]}-{dim}.safetensors"
