"""GGUF file → configuration and parameters. Which tensors a model must have follows from its configuration alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from atlas_jax.aot import shape, shapes
from atlas_jax.config import ConfigError, DeltaNetConfig, ExpertsConfig, LayerConfig, ModelConfig, RopeConfig
from atlas_jax.config import WeightDtype as WeightDtype
from atlas_jax.gguf import ModelFile, TensorType, get
from atlas_jax.kernels.linear import PackedArray, QuantArray, stays_coded
from atlas_jax.kernels.rope import rope_table
from atlas_jax.kernels.weight_forms import OWN_FORM, Form
from atlas_jax.model.families import FAMILIES
from atlas_jax.model.families._family import Fields, UnsupportedModel, Vocabulary
from atlas_jax.model.layer_reader import read_layer
from atlas_jax.model.params import DeltaParams, ExpertParams, LayerParams, ModelParams
from atlas_jax.model.tensor_reader import TensorReader
from atlas_jax.sharding import ONE_DEVICE, MeshLayout

EMBED, HEAD = "token_embd.weight", "output.weight"
_FINAL_NORM, _FINAL_NORM_BIAS = "output_norm.weight", "output_norm.bias"
_ROPE_FACTORS = "rope_freqs.weight"
_LONG_FACTORS, _SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_OTHER_PARTS = ("v.", "mm.", "a.")
"""Beginnings of the names of tensors that are no part of a text model: of images, of what brings them in, of sound."""


_OF_NIBBLES = {
    TensorType.MXFP4: Form.FLOATS,
    TensorType.IQ4_NL: Form.LEVELS,
    TensorType.IQ4_XS: Form.LEVELS,
}
"""Forms of the types with 4-bit codes; of all others PAIRS."""


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
        fields = Fields(file.metadata, family, file.tensors.keys())
        config = family.config(fields, _vocabulary(file))
        found = family.frequency_factors and _factors_tensor(file, fields)
        if found:
            config = config.replace(ropes=tuple(_divided(rope, file, found) for rope in config.ropes))
    except ConfigError as error:
        raise UnsupportedModel(f"metadata of architecture '{architecture}': {error}") from error
    return config


def _factors_tensor(file: ModelFile, fields: Fields) -> str | None:
    """The tensor of rotary frequency factors that holds for the model's whole context, if there are any.

    LongRoPE has two of them: one for texts as long as those the model was first trained on, one for longer ones.
    """
    if _ROPE_FACTORS in file.tensors:
        return _ROPE_FACTORS
    name = _LONG_FACTORS if fields.context_length() > fields.original_context_length() else _SHORT_FACTORS
    if name in file.tensors:
        return name
    if fields.rope_scaling_type() == "longrope":
        raise UnsupportedModel(f"tensor '{name}' is missing")
    return None


def _divided(rope: RopeConfig, file: ModelFile, tensor: str) -> RopeConfig:
    """The rotary embedding with frequencies divided by a tensor's factors too."""
    factors = _frequency_factors(file, tensor, rope.dims // 2)
    before = rope.frequency_factors or (1.0,) * len(factors)
    product = tuple(one * other for one, other in zip(before, factors, strict=True))
    return dataclasses.replace(rope, frequency_factors=product)


def _vocabulary(file: ModelFile) -> Vocabulary:
    """Tokens of the file and rows of its embeddings; some models have more rows, which stand for nothing."""
    if EMBED not in file.tensors:
        raise UnsupportedModel(f"tensor '{EMBED}' is missing")
    rows = file.tensors[EMBED].shape[0]
    tokens = len(get(file.metadata, "tokenizer.ggml.tokens", list) or ()) or rows
    if rows < tokens:
        raise UnsupportedModel(f"tensor '{EMBED}' has {rows} rows for {tokens} tokens")
    return Vocabulary(tokens, rows)


def _frequency_factors(file: ModelFile, tensor: str, pairs: int) -> tuple[float, ...]:
    """What divides the rotary frequencies, one number for every pair of a head: Llama 3.1's scaling is stored so."""
    factors = tuple(float(x) for x in file.dequantize(tensor).reshape(-1))
    if len(factors) != pairs:
        raise UnsupportedModel(f"tensor '{tensor}' has {len(factors)} values, expected {pairs}")
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise UnsupportedModel(f"tensor '{tensor}' holds values that are not greater than 0")
    return factors


def left_out(file: ModelFile) -> list[str]:
    """Names of the tensors of a file that are no part of its text model: that read images, or only draft what comes next."""
    prefix = f"{file.metadata.get('general.architecture')}."
    layers, drafting = (file.metadata.get(prefix + key) for key in ("block_count", "nextn_predict_layers"))
    others: tuple[str, ...] = _OTHER_PARTS
    if isinstance(layers, int) and isinstance(drafting, int):
        others += tuple(f"blk.{index}." for index in range(layers - drafting, layers))
    return [name for name in file.tensors if name.startswith(others)]


def load_params(
    file: ModelFile,
    config: ModelConfig,
    *,
    dtype: WeightDtype = "int8",
    mesh_layout: MeshLayout = ONE_DEVICE,
    progress: _Progress | None = None,
    read: Callable[[ModelFile, WeightDtype, Mapping[str, Form], Collection[str]], TensorReader] = TensorReader,
) -> ModelParams:
    """Reads the weights.

    Args:
      dtype: "int8" keeps every matrix in 8 bits with a scale per row, or in about as many as the file has where that is
        fewer and the CPU kernels take them; "float32" is the reference mode.
      mesh_layout: where they go, layer by layer.
      progress: called with layers done and in all.
      read: what takes the tensors; `tensor_shapes` has one that reads none of them.

    Raises:
      UnsupportedModel: a tensor is missing, unknown or misshapen; the message names it.
    """
    forms = weight_forms(file, config) if dtype == "int8" and mesh_layout.mesh is None else {}
    reader = read(file, dtype, forms, left_out(file))
    if FAMILIES[config.family].frequency_factors:
        for name in (_ROPE_FACTORS, _LONG_FACTORS, _SHORT_FACTORS):
            reader.take(name)
    layers = []
    for index in range(len(config.layers)):
        layers.append(mesh_layout.weights(read_layer(reader, config, index)))
        if progress is not None:
            progress(index + 1, len(config.layers))
    norm = reader.vector({_FINAL_NORM: config.embed}, factor=config.logit_scale)
    norm_bias = reader.vector({_FINAL_NORM_BIAS: config.embed}, factor=config.logit_scale) if config.norm_bias else None
    params = ModelParams(
        embed=reader.vocabulary(EMBED, config),
        layers=tuple(layers),
        final_norm=norm,
        final_norm_bias=norm_bias,
        head=None if config.tied_head else reader.vocabulary(HEAD, config),
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

    def gain(heads: int) -> Any:
        each = () if config.qk_norm == "head" else (heads,)
        return shape((*each, dim), np.float32) if config.qk_norm else None

    def experts(of: ExpertsConfig) -> ExpertParams:
        def matrices(outputs: int, inputs: int) -> Any:
            one = matrix(outputs, inputs)
            return jax.tree.map(lambda leaf: shape((of.count, *leaf.shape), leaf.dtype), one)

        return ExpertParams(
            router=shape((of.count, embed), np.float32),
            expert_gate_up=matrices(2 * of.ff, embed),
            expert_down=matrices(embed, of.ff),
            shared_gate=vector(embed, bool(of.shared_ff)),
            shared_gate_up=matrix(2 * of.shared_ff, embed) if of.shared_ff else None,
            shared_down=matrix(embed, of.shared_ff) if of.shared_ff else None,
            router_bias=vector(of.count, of.biases),
            expert_gate_up_bias=shape((of.count, 2 * of.ff), np.float32) if of.biases else None,
            expert_down_bias=shape((of.count, embed), np.float32) if of.biases else None,
        )

    def delta_net(of: DeltaNetConfig) -> DeltaParams:
        return DeltaParams(
            project=matrix(of.channels + of.heads * of.dim, embed),
            gates=shape((2 * of.heads, embed), np.float32),
            conv=shape((of.channels, of.conv), np.float32),
            decay=vector(of.heads),
            decay_bias=vector(of.heads),
            norm=vector(of.dim),
        )

    embed, dim = config.embed, config.head_dim
    qkv, wide = config.qkv_heads * dim, config.ff * (2 if config.gated else 1)
    ff_norm = config.pre_norms and not config.parallel
    attending = LayerParams(
        attn_norm=vector(embed, config.pre_norms),
        attn_norm_bias=vector(embed, config.pre_norms and config.norm_bias),
        qkv=matrix(qkv, embed),
        qkv_bias=vector(qkv, config.qkv_bias),
        key_balance=shape((config.kv_heads, config.groups + 2, dim), np.float32) if config.balances_keys else None,
        q_norm=gain(config.heads),
        k_norm=gain(config.kv_heads),
        null_logit=vector(config.heads, config.null_logits),
        out=matrix(embed, config.heads * dim),
        out_bias=vector(embed, config.out_bias),
        attn_post_norm=vector(embed, config.post_norms),
        ff_norm=vector(embed, ff_norm),
        ff_norm_bias=vector(embed, ff_norm and config.norm_bias),
        gate_up=None if config.experts else matrix(wide, embed),
        gate_up_bias=vector(wide, config.gate_up_bias),
        down=None if config.experts else matrix(embed, config.ff),
        down_bias=vector(embed, config.down_bias),
        ff_post_norm=vector(embed, config.post_norms),
        experts=None if config.experts is None else experts(config.experts),
    )

    def layer(spec: LayerConfig) -> LayerParams:
        of = config.delta_net
        if spec.kind == "attention" or of is None:
            return attending
        none: dict[str, Any] = dict.fromkeys(("qkv", "qkv_bias", "key_balance", "q_norm", "k_norm", "null_logit"))
        return dataclasses.replace(attending, **none, out=matrix(embed, of.heads * of.dim), delta=delta_net(of))

    return ModelParams(
        embed=matrix(config.vocab, embed),
        layers=tuple(map(layer, config.layers)),
        final_norm=vector(embed),
        final_norm_bias=vector(embed, config.norm_bias),
        head=None if config.tied_head else matrix(config.vocab, embed),
        ropes=tuple(shapes(rope_table(rope)) for rope in config.ropes),
    )


def parameter_count(params: ModelParams) -> int:
    """Number of weights, scales and rotary tables not counted."""

    def sizes() -> Iterator[int]:
        is_weight = lambda leaf: isinstance(leaf, QuantArray | PackedArray)  # noqa: E731
        without_tables = (params.embed, params.layers, params.final_norm, params.final_norm_bias, params.head)
        for leaf in jax.tree.leaves(without_tables, is_leaf=is_weight):
            yield int(np.prod(leaf.shape))

    return sum(sizes())


def weight_forms(file: ModelFile, config: ModelConfig) -> dict[str, Form]:
    """Forms of the matrices that can stay in fewer bits than 8: as every layer has them, so that layers share their programs.

    Where layers differ, as a file has some of them in more bits, it is the widest of their forms.
    """
    by_role: dict[str, list[str]] = {}
    for name in file.tensors.keys() - left_out(file):
        by_role.setdefault(name.split(".", 2)[-1] if name.startswith("blk.") else name, []).append(name)

    def form(names: list[str]) -> Form | None:
        tensors = [file.tensors[name] for name in names]
        if any(len(one.shape) < 2 for one in tensors):
            return None
        outputs = [config.vocab if one.name in (EMBED, HEAD) else one.shape[-2] for one in tensors]
        if not all(stays_coded(one.shape[-1], n) for one, n in zip(tensors, outputs, strict=True)):
            return None
        own = [OWN_FORM.get(one.ggml_type) for one in tensors]
        if all(one is not None and not tensor.shape[-1] % one.span for one, tensor in zip(own, tensors, strict=True)):
            return max((one for one in own if one is not None), key=lambda one: one.value)
        if not all(map(file.has_nibbles, names)):
            return None
        forms = {_OF_NIBBLES.get(one.ggml_type, Form.PAIRS) for one in tensors}
        return None if len(forms) > 1 else forms.pop()

    found = {name: form(names) for names in by_role.values() for name in names}
    return {name: one for name, one in found.items() if one is not None}
