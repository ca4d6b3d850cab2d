"""Trained models as GGUF and back: Llama-pattern models under the architecture `llama`, all others under `atlas`.

A `llama` file has the names, layouts and metadata every reader of that architecture knows. An `atlas` file keeps each
parameter in its own shape under a name made of its place in the model, and the whole configuration as JSON.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import ConfigError
from atlas_jax.gguf import GGUFError, GGUFFile, write_gguf
from atlas_jax.gguf._writer import Value
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.model import LMParams, init_params
from atlas_jax.model.loading import model_config

ARCHITECTURE = "atlas"
CONFIG_KEY = f"{ARCHITECTURE}.config"

_TOP = {"embed": "token_embd.weight", "final_norm.scale": "output_norm.weight", "head": "output.weight"}

_LLAMA = {  # tensor in a `llama` file, and how many leading axes of ours are its inputs
    "mixer_norm.scale": ("attn_norm.weight", 0),
    "mixer.q": ("attn_q.weight", 1),
    "mixer.k": ("attn_k.weight", 1),
    "mixer.v": ("attn_v.weight", 1),
    "mixer.out": ("attn_output.weight", 2),
    "mlp_norm.scale": ("ffn_norm.weight", 0),
    "mlp.gate": ("ffn_gate.weight", 1),
    "mlp.up": ("ffn_up.weight", 1),
    "mlp.down": ("ffn_down.weight", 1),
}

Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def export_gguf(
    path: str | os.PathLike[str],
    config: LMConfig,
    params: LMParams,
    tokenizer: Mapping[str, Value],
    *,
    name: str = "atlas-jax model",
) -> None:
    """Writes a model; reading it back gives the same numbers, bit for bit.

    Args:
      params: as `split` gives them.
      tokenizer: `tokenizer.ggml.*` metadata, such as `atlas_jax.gguf.byte_vocabulary()`.

    Raises:
      ValueError: the parameters are not those of the configuration.
      OSError: the file cannot be written.
    """
    _check(config, params)
    architecture = "llama" if config.is_llama else ARCHITECTURE
    flat = _flatten(params)
    tensors = _llama_tensors(flat) if config.is_llama else {_tensor_name(p): x for p, x in flat.items()}
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.name": name,
        f"{architecture}.vocab_size": config.vocab,
        f"{architecture}.context_length": config.context_length,
        f"{architecture}.embedding_length": config.embed,
        f"{architecture}.block_count": len(config.pattern),
        f"{architecture}.feed_forward_length": config.ff,
        f"{architecture}.attention.head_count": config.heads,
        f"{architecture}.attention.head_count_kv": config.n_kv,
        f"{architecture}.attention.key_length": config.dim,
        f"{architecture}.attention.value_length": config.dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{architecture}.rope.dimension_count": config.dim,
        f"{architecture}.rope.freq_base": config.rope_base,
    }
    if not config.is_llama:
        metadata |= {f"{ARCHITECTURE}.layer_pattern": config.pattern, CONFIG_KEY: config.to_json()}
    write_gguf(path, metadata | dict(tokenizer), tensors)


def import_gguf(path: str | os.PathLike[str]) -> tuple[LMConfig, LMParams]:
    """Reads a model that `export_gguf` wrote, or any float `llama` file with rotary pairs and no scaling, for training.

    Raises:
      GGUFError: not such a file; the message says what is wrong.
      OSError: the file cannot be read.
    """
    with GGUFFile.open(path) as file:
        return read_gguf(file)


def read_gguf(file: GGUFFile) -> tuple[LMConfig, LMParams]:
    """`import_gguf` of a file that is open; raises GGUFError."""
    config, layout, shapes = _planned(file)
    flat = {}
    for place, (tensor, stored, transposed) in layout.items():
        values = file.dequantize(tensor)
        if values.shape != stored:
            raise GGUFError(f"tensor {tensor!r} has shape {values.shape}, expected {stored}")
        flat[place] = jnp.asarray((values.T if transposed else values).reshape(shapes[place]))
    return config, _unflatten(flat)


def check_gguf(file: GGUFFile) -> LMConfig:
    """What `read_gguf` would read, without reading a tensor; raises GGUFError where it would refuse one."""
    config, layout, _ = _planned(file)
    for tensor, stored, _ in layout.values():
        found = tuple(file.tensor(tensor).shape)
        if found != stored:
            raise GGUFError(f"tensor {tensor!r} has shape {found}, expected {stored}")
    return config


def _planned(
    file: GGUFFile,
) -> tuple[LMConfig, dict[str, tuple[str, tuple[int, ...], bool]], dict[str, tuple[int, ...]]]:
    """A file's configuration; by a parameter's place its tensor, the shape that has there, and whether it is ours
    transposed; and the parameters' own shapes."""
    architecture = file.require("general.architecture", str)
    if architecture not in (ARCHITECTURE, "llama"):
        raise GGUFError(f"architecture {architecture!r} cannot be trained (known: {ARCHITECTURE}, llama)")
    try:
        config = _llama_config(file) if architecture == "llama" else LMConfig.from_json(file.require(CONFIG_KEY, str))
        if len(config.pattern) > len(file.tensors):  # before anything is made of a layer
            raise GGUFError(f"{CONFIG_KEY} has more layers than the file has tensors")
        shapes = _flatten_shapes(config)
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, GGUFError):
            raise
        raise GGUFError(f"{CONFIG_KEY}: {error}") from error
    if architecture == ARCHITECTURE:
        layout = {place: (_tensor_name(place), shape, False) for place, shape in shapes.items()}
    else:
        layout = {place: _llama_layout(place, shape) for place, shape in shapes.items()}
    extra = sorted(set(file.tensors) - {tensor for tensor, _, _ in layout.values()})
    if extra:
        raise GGUFError(f"tensor {extra[0]!r} is no part of the model")
    return config, layout, shapes


def _llama_config(file: GGUFFile) -> LMConfig:
    found = model_config(file)
    rope = found.ropes[0]
    scaled = rope.position_scale != 1.0 or rope.frequency_factors is not None or rope.magnitude != 1.0
    if scaled or rope.dims != found.head_dim:
        raise GGUFError("scaled or partial rotary embeddings cannot be trained")
    return LMConfig(
        vocab=found.vocab,
        embed=found.embed,
        ff=found.ff,
        heads=found.heads,
        kv_heads=found.kv_heads,
        head_dim=found.head_dim,
        pattern="A" * len(found.layers),
        context_length=found.context_length,
        rope_base=_decimal(rope.base),
        norm_eps=_decimal(found.norm_eps),
        tied_head=found.tied_head,
    )


def _decimal(value: float) -> float:
    """The number a float32 was written as: 1e-5 for 9.99999974e-6, so that a configuration survives the round trip."""
    return float(str(np.float32(value)))


def _llama_layout(place: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], bool]:
    """A parameter's tensor in a `llama` file: its name, its shape [out, in], and whether that is ours transposed."""
    if place in _TOP:
        return _TOP[place], shape, False
    _, index, rest = place.split(".", 2)
    name, inputs = _LLAMA[rest]
    if not inputs:
        return f"blk.{index}.{name}", shape, False
    return f"blk.{index}.{name}", (math.prod(shape[inputs:]), math.prod(shape[:inputs])), True


def _llama_tensors(flat: Arrays) -> Arrays:
    tensors = {}
    for place, values in flat.items():
        name, stored, transposed = _llama_layout(place, values.shape)
        tensors[name] = values.reshape(stored[::-1]).T if transposed else values
    return tensors


def _tensor_name(place: str) -> str:
    return _TOP[place] if place in _TOP else place.replace("blocks.", "blk.", 1)


def _check(config: LMConfig, params: LMParams) -> None:
    wanted = _flatten_shapes(config)
    found = {place: x.shape for place, x in _flatten(params).items()}
    for place in sorted(wanted.keys() | found.keys()):
        if wanted.get(place) != found.get(place):
            raise ValueError(f"parameter {place} has shape {found.get(place)}, the model asks for {wanted.get(place)}")


def _flatten_shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    abstract = jax.eval_shape(lambda: init_params(config, 0))
    return {_place(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}


def _flatten(params: LMParams) -> Arrays:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {_place(path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def _place(path: Any) -> str:
    return ".".join(str(key.key) for key in path)


def _unflatten(flat: Mapping[str, jax.Array]) -> LMParams:
    params: LMParams = {}
    for place, values in flat.items():
        node: dict[Any, Any] = params
        *parents, last = place.split(".")
        for part in parents:
            node = node.setdefault(int(part) if part.isdigit() else part, {})
        node[last] = values
    return params
