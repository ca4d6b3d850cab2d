"""GGUF file → configuration and parameters. Which tensors a model must have follows from its configuration alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.aot import shape, shapes
from atlas_jax.config import ConfigError, ModelConfig, RopeConfig
from atlas_jax.config import WeightDtype as WeightDtype
from atlas_jax.gguf import ModelFile, get
from atlas_jax.kernels.linear import PackedArray, QuantArray, Weight, pack_weight, quantize_weight, uses_cpu_kernel
from atlas_jax.kernels.rope import rope_table
from atlas_jax.model.families import FAMILIES
from atlas_jax.model.families._family import Fields, UnsupportedModel, Vocabulary
from atlas_jax.model.params import LayerParams, ModelParams
from atlas_jax.sharding import ONE_DEVICE, MeshLayout

_EMBED, _FINAL_NORM, _HEAD, _ROPE_FACTORS = (
    "token_embd.weight",
    "output_norm.weight",
    "output.weight",
    "rope_freqs.weight",
)
_OTHER_PARTS = ("v.", "mm.", "a.")
"""Beginnings of the names of tensors that are no part of a text model: of images, of what brings them in, of sound."""


class _Progress(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


def model_config(file: ModelFile) -> ModelConfig:
    """Reads the configuration of a GGUF model.

    Raises:
      UnsupportedModel: the architecture, or a metadata value of it, is not understood; the message names it.
    """
    architecture = file.metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(f"architecture {architecture!r} is not supported (known: {known})")
    try:
        config = family.config(Fields(file.metadata, family.architecture), _vocabulary(file))
        if family.frequency_factors and _ROPE_FACTORS in file.tensors:
            factors = _frequency_factors(file, config.ropes[0].dims // 2)
            config = config.replace(
                ropes=tuple(dataclasses.replace(rope, frequency_factors=factors) for rope in config.ropes)
            )
    except ConfigError as error:
        raise UnsupportedModel(f"metadata of architecture '{architecture}': {error}") from error
    return config.replace(tied_head=_HEAD not in file.tensors)


def _vocabulary(file: ModelFile) -> Vocabulary:
    """Tokens of the file and rows of its embeddings; some models have more rows, which stand for nothing."""
    if _EMBED not in file.tensors:
        raise UnsupportedModel(f"tensor '{_EMBED}' is missing")
    rows = file.tensors[_EMBED].shape[0]
    tokens = len(get(file.metadata, "tokenizer.ggml.tokens", list) or ()) or rows
    if rows < tokens:
        raise UnsupportedModel(f"tensor '{_EMBED}' has {rows} rows for {tokens} tokens")
    return Vocabulary(tokens, rows)


def _frequency_factors(file: ModelFile, pairs: int) -> tuple[float, ...]:
    """What divides the rotary frequencies, one number for every pair of a head: Llama 3.1's scaling is stored so."""
    factors = tuple(float(x) for x in file.dequantize(_ROPE_FACTORS).reshape(-1))
    if len(factors) != pairs:
        raise UnsupportedModel(f"tensor '{_ROPE_FACTORS}' has {len(factors)} values, expected {pairs}")
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise UnsupportedModel(f"tensor '{_ROPE_FACTORS}' holds values that are not greater than 0")
    return factors


def left_out(file: ModelFile) -> list[str]:
    """Names of the tensors of a file that are no part of its text model, such as those that read images."""
    return [name for name in file.tensors if name.startswith(_OTHER_PARTS)]


def load_params(
    file: ModelFile,
    config: ModelConfig,
    *,
    dtype: WeightDtype = "int8",
    mesh_layout: MeshLayout = ONE_DEVICE,
    progress: _Progress | None = None,
) -> ModelParams:
    """Reads the weights.

    Args:
      dtype: "int8" keeps every matrix in 8 bits with a scale per row, or in 5 where the file has 4-bit codes and the
        CPU kernels take them; "float32" is the reference mode.
      mesh_layout: where they go, layer by layer.
      progress: called with layers done and in all.

    Raises:
      UnsupportedModel: a tensor is missing, unknown or misshapen; the message names it.
    """
    reader = _Reader(
        file, dtype, _packed(file, config) if dtype == "int8" and mesh_layout.mesh is None else frozenset()
    )
    if any(rope.frequency_factors is not None for rope in config.ropes):
        reader.take(_ROPE_FACTORS)
    layers = []
    for index in range(len(config.layers)):
        layers.append(mesh_layout.weights(_layer(reader, config, index)))
        if progress is not None:
            progress(index + 1, len(config.layers))
    params = ModelParams(
        embed=reader.vocabulary(_EMBED, config),
        layers=tuple(layers),
        final_norm=reader.vector(_FINAL_NORM, config.embed),
        head=None if config.tied_head else reader.vocabulary(_HEAD, config),
        ropes=tuple(rope_table(rope) for rope in config.ropes),
    )
    reader.finish()
    return mesh_layout.weights(params)


def param_shapes(config: ModelConfig, dtype: WeightDtype = "int8") -> ModelParams:
    """Shapes and types of what `load_params` makes of a model of this configuration."""

    def vector(size: int, wanted: bool = True) -> Any:
        return shape((size,), np.float32) if wanted else None

    def matrix(outputs: int, inputs: int) -> Any:
        if dtype == "float32":
            return shape((outputs, inputs), np.float32)
        return QuantArray(shape((outputs, inputs), np.int8), vector(outputs))

    embed, dim = config.embed, config.head_dim
    layer = LayerParams(
        attn_norm=vector(embed),
        qkv=matrix((config.heads + 2 * config.kv_heads) * dim, embed),
        q_norm=vector(dim, config.qk_norm),
        k_norm=vector(dim, config.qk_norm),
        out=matrix(embed, config.heads * dim),
        attn_post_norm=vector(embed, config.post_norms),
        ff_norm=vector(embed),
        gate_up=matrix(2 * config.ff, embed),
        down=matrix(embed, config.ff),
        ff_post_norm=vector(embed, config.post_norms),
    )
    return ModelParams(
        embed=matrix(config.vocab, embed),
        layers=(layer,) * len(config.layers),
        final_norm=vector(embed),
        head=None if config.tied_head else matrix(config.vocab, embed),
        ropes=tuple(shapes(rope_table(rope)) for rope in config.ropes),
    )


def parameter_count(params: ModelParams) -> int:
    """Number of weights, scales and rotary tables not counted."""

    def sizes() -> Iterator[int]:
        is_weight = lambda leaf: isinstance(leaf, QuantArray | PackedArray)  # noqa: E731
        without_tables = (params.embed, params.layers, params.final_norm, params.head)
        for leaf in jax.tree.leaves(without_tables, is_leaf=is_weight):
            yield int(np.prod(leaf.shape))

    return sum(sizes())


def _packed(file: ModelFile, config: ModelConfig) -> frozenset[str]:
    """Names of the matrices that can stay in 5 bits: as every layer has them, so that layers share their programs."""
    by_role: dict[str, list[str]] = {}
    for name in file.tensors:
        by_role.setdefault(name.split(".", 2)[-1] if name.startswith("blk.") else name, []).append(name)

    def taken(name: str) -> bool:
        shape = file.tensors[name].shape
        outputs = config.vocab if name in (_EMBED, _HEAD) else shape[0]
        return file.has_nibbles(name) and uses_cpu_kernel(shape[1], outputs)

    return frozenset(name for names in by_role.values() if all(map(taken, names)) for name in names)


class _Reader:
    """Takes tensors by name, checks shapes, and remembers what was taken."""

    def __init__(self, file: ModelFile, dtype: WeightDtype, packed: frozenset[str]) -> None:
        self._file = file
        self._dtype = dtype
        self._packed = packed
        self._taken = set(left_out(file))

    def vector(self, name: str, size: int, order: np.ndarray | None = None) -> jax.Array:
        values = self._read(name, (size,))
        return jnp.asarray(values if order is None else values[order])

    def vocabulary(self, name: str, config: ModelConfig) -> Weight:
        """A matrix with a row for every token; rows past the last token, which can mean nothing, are not read."""
        rows = self._file.tensors[name].shape[0] if name in self._file.tensors else 0
        padded = max(rows, config.vocab)
        order = np.arange(config.vocab) if padded > config.vocab else None
        return self.matrix([name], [(padded, config.embed)], order)

    def matrix(self, names: list[str], shapes: list[tuple[int, int]], order: np.ndarray | None = None) -> Weight:
        """Tensors stacked along their outputs, these then put in `order`; quantised row by row, so no number changes."""
        if self._packed.issuperset(names):
            packed = [self._pack(name, shape) for name, shape in zip(names, shapes, strict=True)]
            blocks, scale = (np.concatenate(arrays) for arrays in zip(*packed, strict=True))
            rows = slice(None) if order is None else order
            return PackedArray(jnp.asarray(blocks[rows]), jnp.asarray(scale[rows]))
        parts = [self._read(name, shape) for name, shape in zip(names, shapes, strict=True)]
        whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if order is not None:
            whole = whole[order]
        if self._dtype == "float32":
            return jnp.asarray(whole)
        values, scale = quantize_weight(whole)
        return QuantArray(jnp.asarray(values), jnp.asarray(scale))

    def take(self, name: str) -> None:
        """Marks a tensor as understood."""
        self._taken.add(name)

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self._take(name, shape)
        values = self._file.dequantize(name)
        _check_finite(name, values)
        return values

    def _pack(self, name: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        self._take(name, shape)
        nibbles = self._file.nibbles(name)
        _check_finite(name, nibbles.step, nibbles.base)
        return pack_weight(nibbles.codes, nibbles.step, nibbles.base)

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        info = self._file.tensors.get(name)
        if info is None:
            raise UnsupportedModel(f"tensor '{name}' is missing")
        if tuple(info.shape) != shape:
            raise UnsupportedModel(f"tensor '{name}' has shape {tuple(info.shape)}, expected {shape}")
        self._taken.add(name)

    def finish(self) -> None:
        left = sorted(set(self._file.tensors) - self._taken)
        if left:
            raise UnsupportedModel(f"tensor '{left[0]}' is not understood")


def _check_finite(name: str, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise UnsupportedModel(f"tensor '{name}' holds values that are not finite")


def _layer(reader: _Reader, config: ModelConfig, index: int) -> LayerParams:
    prefix = f"blk.{index}."
    embed, dim = config.embed, config.head_dim
    q_size, kv_size = config.heads * dim, config.kv_heads * dim
    rope = config.ropes[config.layers[index].rope]

    def norm(name: str, wanted: bool, size: int, order: np.ndarray | None = None) -> jax.Array | None:
        return reader.vector(f"{prefix}{name}.weight", size, order) if wanted else None

    within_head = _head_order(config, rope)

    return LayerParams(
        attn_norm=reader.vector(f"{prefix}attn_norm.weight", embed),
        qkv=reader.matrix(
            [f"{prefix}attn_{part}.weight" for part in "qkv"],
            [(q_size, embed), (kv_size, embed), (kv_size, embed)],
            _by_kv_head(config, rope),
        ),
        q_norm=norm("attn_q_norm", config.qk_norm, dim, within_head),
        k_norm=norm("attn_k_norm", config.qk_norm, dim, within_head),
        out=reader.matrix([f"{prefix}attn_output.weight"], [(embed, q_size)]),
        attn_post_norm=norm("post_attention_norm", config.post_norms, embed),
        ff_norm=reader.vector(f"{prefix}ffn_norm.weight", embed),
        gate_up=reader.matrix(
            [f"{prefix}ffn_gate.weight", f"{prefix}ffn_up.weight"],
            [(config.ff, embed)] * 2,
            np.arange(2 * config.ff).reshape(2, -1, config.ff_block).swapaxes(0, 1).reshape(-1),
        ),
        down=reader.matrix([f"{prefix}ffn_down.weight"], [(embed, config.ff)]),
        ff_post_norm=norm("post_ffw_norm", config.post_norms, embed),
    )


def _by_kv_head(config: ModelConfig, rope: RopeConfig) -> np.ndarray:
    """Order of the outputs of q, k and v that `LayerParams.qkv` has."""
    heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    order = _head_order(config, rope)
    rows = np.arange((heads + 2 * kv_heads) * dim).reshape(-1, dim)
    q, k, v = np.split(rows, [heads, heads + kv_heads])
    return np.concatenate([q[:, order].reshape(kv_heads, -1), k[:, order], v], axis=1).reshape(-1)


def _head_order(config: ModelConfig, rope: RopeConfig) -> np.ndarray:
    """Order of the dimensions of query and key heads in which rotated pairs are (i, i + dims/2), as in the kernels."""
    dim, rotating = config.head_dim, np.arange(rope.dims)
    if not rope.interleaved:
        return np.arange(dim)
    return np.concatenate([rotating[0::2], rotating[1::2], np.arange(rope.dims, dim)])
