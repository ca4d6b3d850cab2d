"""GGUF file → configuration and parameters. Which tensors a model must have follows from its configuration alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.aot import shape, shapes
from atlas_jax.config import (
    ConfigError,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
    columns_together,
)
from atlas_jax.config import WeightDtype as WeightDtype
from atlas_jax.gguf import ModelFile, TensorType, get
from atlas_jax.kernels.linear import InterleavedArray, PackedArray, QuantArray, Weight, stays_coded
from atlas_jax.kernels.rope import rope_table
from atlas_jax.kernels.weight_forms import OWN_FORM, Form
from atlas_jax.model.families import FAMILIES
from atlas_jax.model.families._family import Fields, UnsupportedModel, Vocabulary
from atlas_jax.model.key_balance import balanced, key_balance
from atlas_jax.model.params import DeltaParams, ExpertParams, LayerParams, ModelParams
from atlas_jax.model.tensor_reader import Outputs, TensorReader
from atlas_jax.sharding import ONE_DEVICE, MeshLayout

_EMBED, _HEAD = "token_embd.weight", "output.weight"
_FINAL_NORM, _FINAL_NORM_BIAS = "output_norm.weight", "output_norm.bias"
_ROPE_FACTORS = "rope_freqs.weight"
_LONG_FACTORS, _SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
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
    if _EMBED not in file.tensors:
        raise UnsupportedModel(f"tensor '{_EMBED}' is missing")
    rows = file.tensors[_EMBED].shape[0]
    tokens = len(get(file.metadata, "tokenizer.ggml.tokens", list) or ()) or rows
    if rows < tokens:
        raise UnsupportedModel(f"tensor '{_EMBED}' has {rows} rows for {tokens} tokens")
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
    read: type[TensorReader] = TensorReader,
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
        layers.append(mesh_layout.weights(_layer(reader, config, index)))
        if progress is not None:
            progress(index + 1, len(config.layers))
    norm = reader.vector({_FINAL_NORM: config.embed}, factor=config.logit_scale)
    norm_bias = reader.vector({_FINAL_NORM_BIAS: config.embed}, factor=config.logit_scale) if config.norm_bias else None
    params = ModelParams(
        embed=reader.vocabulary(_EMBED, config),
        layers=tuple(layers),
        final_norm=norm,
        final_norm_bias=norm_bias,
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
        outputs = [config.vocab if one.name in (_EMBED, _HEAD) else one.shape[-2] for one in tensors]
        if not all(stays_coded(one.shape[-1], n) for one, n in zip(tensors, outputs, strict=True)):
            return None
        own = [OWN_FORM.get(one.ggml_type) for one in tensors]
        if all(one is not None and not tensor.shape[-1] % one.span for one, tensor in zip(own, tensors, strict=True)):
            return max((one for one in own if one is not None), key=lambda one: one.value)
        if not all(map(file.has_nibbles, names)):
            return None
        floats = {one.ggml_type == TensorType.MXFP4 for one in tensors}
        return None if len(floats) > 1 else Form.FLOATS if True in floats else Form.PAIRS

    found = {name: form(names) for names in by_role.values() for name in names}
    return {name: one for name, one in found.items() if one is not None}


def _layer(reader: TensorReader, config: ModelConfig, index: int) -> LayerParams:
    prefix = f"blk.{index}."
    embed, ff, spec = config.embed, config.ff, config.layers[index]
    by_block = _by_block(config)
    of_matrices, of_norms = (1.0, config.residual_scale) if config.post_norms else (config.residual_scale, 1.0)
    ff_norm = config.pre_norms and not config.parallel

    def mlp(kind: str) -> Outputs:
        gate = {f"{prefix}ffn_gate.{kind}": ff} if config.gated else {}
        return reader.stacked(f"{prefix}ffn_up.{kind}", {**gate, f"{prefix}ffn_up.{kind}": ff})

    def vector(name: str, wanted: bool, factor: float = 1.0) -> jax.Array | None:
        return reader.vector({prefix + name: embed}, factor=factor) if wanted else None

    return LayerParams(
        **(_attention if spec.kind == "attention" else _delta_net)(reader, config, spec, prefix, of_matrices),
        attn_norm=vector("attn_norm.weight", config.pre_norms),
        attn_norm_bias=vector("attn_norm.bias", config.pre_norms and config.norm_bias),
        out_bias=vector("attn_output.bias", config.out_bias, of_matrices),
        attn_post_norm=vector("post_attention_norm.weight", config.post_norms, of_norms),
        # between attention and MLP without a norm after attention, files call it by either name
        ff_norm=vector(
            "post_attention_norm.weight"
            if not config.post_norms and reader.has(f"{prefix}post_attention_norm.weight")
            else "ffn_norm.weight",
            ff_norm,
        ),
        ff_norm_bias=vector("ffn_norm.bias", ff_norm and config.norm_bias),
        gate_up=None if config.experts else reader.matrix(mlp("weight"), embed, by_block),
        gate_up_bias=reader.vector(mlp("bias"), by_block) if config.gate_up_bias else None,
        down=None if config.experts else reader.matrix({f"{prefix}ffn_down.weight": embed}, ff, factor=of_matrices),
        down_bias=vector("ffn_down.bias", config.down_bias, of_matrices),
        ff_post_norm=vector("post_ffw_norm.weight", config.post_norms, of_norms),
        experts=None if config.experts is None else _experts(reader, config, config.experts, prefix, of_matrices),
    )


def _attention(
    reader: TensorReader, config: ModelConfig, spec: LayerConfig, prefix: str, factor: float
) -> dict[str, Any]:
    """The fields of a layer's parameters that are attention's."""
    dim = config.head_dim
    gated = 2 if config.attention_gate else 1
    order = _head_order(config, config.ropes[spec.rope])
    by_kv_head = _by_kv_head(config, order)
    sizes = gated * config.heads * dim, config.kv_heads * dim, config.kv_heads * dim

    def stacked(kind: str) -> Outputs:
        parts = {f"{prefix}attn_{part}.{kind}": size for part, size in zip("qkv", sizes, strict=True)}
        return reader.stacked(f"{prefix}attn_qkv.{kind}", parts)

    def gain(name: str, heads: int) -> jax.Array | None:
        if config.qk_norm is None:
            return None
        stored = {"head": (dim,), "heads": (heads, dim), "width": (heads * dim,)}[config.qk_norm]
        shape = (dim,) if config.qk_norm == "head" else (heads, dim)
        return jnp.asarray(reader.array(f"{prefix}{name}.weight", stored).reshape(shape)[..., order])

    def keys(kind: str, *inner: int) -> np.ndarray:
        parts = [reader.array(name, (size, *inner)) for name, size in stacked(kind).items()]
        return np.concatenate(parts)[sizes[0] : sizes[0] + sizes[1]].reshape(config.kv_heads, dim, *inner)[:, order]

    balance = None
    if config.balances_keys:
        norm = (
            reader.array(f"{prefix}attn_norm.weight", (config.embed,)) if config.pre_norms else np.ones(1, np.float32)
        )
        balance = key_balance(keys("bias"), keys("weight", config.embed) * norm, config.ropes[spec.rope].dims)
    return {
        "key_balance": None if balance is None else jnp.asarray(balanced(balance, config.groups)),
        "qkv": reader.matrix(stacked("weight"), config.embed, by_kv_head)
        if config.attention_gate
        else _qkv(reader, config, stacked("weight"), order),
        "qkv_bias": reader.vector(stacked("bias"), by_kv_head) if config.qkv_bias else None,
        "q_norm": gain("attn_q_norm", config.heads),
        "k_norm": gain("attn_k_norm", config.kv_heads),
        "null_logit": reader.vector({f"{prefix}attn_sinks.weight": config.heads}) if config.null_logits else None,
        "out": reader.matrix({f"{prefix}attn_output.weight": config.embed}, config.heads * dim, factor=factor),
    }


def _delta_net(
    reader: TensorReader, config: ModelConfig, spec: LayerConfig, prefix: str, factor: float
) -> dict[str, Any]:
    """The fields of a layer's parameters that are those of a Gated DeltaNet in place of attention's."""
    of, embed = config.delta_net, config.embed
    assert of is not None
    inner = of.heads * of.dim
    joined, together = f"{prefix}ssm_in.weight", f"{prefix}ssm_ba.weight"
    if reader.has(joined):
        project = reader.matrix({joined: of.channels + inner}, embed, _by_part(of, (1, 1, None, None), of.dim))
    else:
        project = reader.matrix({f"{prefix}attn_qkv.weight": of.channels, f"{prefix}attn_gate.weight": inner}, embed)
    if reader.has(together):
        gates = reader.array(together, (2 * of.heads, embed))[_by_part(of, (None, None), 1)]
    else:
        parts = [reader.array(f"{prefix}ssm_{name}.weight", (of.heads, embed)) for name in ("beta", "alpha")]
        gates = np.concatenate(parts)
    delta = DeltaParams(
        project=project,
        gates=jnp.asarray(gates),
        conv=jnp.asarray(reader.array(f"{prefix}ssm_conv1d.weight", (of.channels, of.conv))),
        decay=reader.vector({f"{prefix}ssm_a": of.heads}),
        decay_bias=reader.vector({f"{prefix}ssm_dt.bias": of.heads}),
        norm=reader.vector({f"{prefix}ssm_norm.weight": of.dim}),
    )
    out = reader.matrix({f"{prefix}ssm_out.weight": embed}, inner, factor=factor)
    none = dict.fromkeys(("qkv", "qkv_bias", "key_balance", "q_norm", "k_norm", "null_logit"))
    return {**none, "out": out, "delta": delta}


def _by_part(of: DeltaNetConfig, heads: Sequence[int | None], dim: int) -> np.ndarray:
    """Order in which rows that a file has by key head, each with all its parts, are part after part.

    Args:
      heads: of each part, for a key head; None for as many as value heads share it.
      dim: rows of a head.
    """
    each = [dim * (of.heads // of.key_heads if one is None else one) for one in heads]
    rows = np.arange(of.key_heads * sum(each)).reshape(of.key_heads, -1)
    parts = np.split(rows, np.cumsum(each)[:-1], axis=1)
    return np.concatenate([part.reshape(-1) for part in parts])


def _qkv(reader: TensorReader, config: ModelConfig, tensors: Outputs, head_order: np.ndarray) -> Weight:
    """`LayerParams.qkv`; in parts where the file has them in records of different forms, as it often has the values."""
    order = _by_kv_head(config, head_order)
    forms = [reader.form({name: size}) for name, size in tensors.items()]
    if len(set(forms)) == 1 or any(form is None or form.span == 64 for form in forms):
        return reader.matrix(tensors, config.embed, order)
    by_head = order.reshape(config.kv_heads, config.groups + 2, config.head_dim)
    heads = dict(zip(tensors, ((0, config.groups), (config.groups, 1), (config.groups + 1, 1)), strict=True))
    parts, lengths, start = list[QuantArray | PackedArray](), list[int](), 0
    for form, group in itertools.groupby(tensors, key=lambda name: reader.form({name: tensors[name]})):
        alike = {name: tensors[name] for name in group}
        first, count = heads[next(iter(alike))][0], sum(heads[name][1] for name in alike)
        part = reader.matrix(alike, config.embed, by_head[:, first : first + count].reshape(-1) - start)
        assert isinstance(part, PackedArray)
        assert part.form is form
        parts.append(part)
        lengths.append(count * config.head_dim)
        start += sum(alike.values())
    return InterleavedArray(tuple(parts), tuple(lengths))


def _experts(
    reader: TensorReader, config: ModelConfig, experts: ExpertsConfig, prefix: str, factor: float
) -> ExpertParams:
    embed, shared = config.embed, experts.shared_ff

    def gate_up(kind: str, ff: int, of: str = "weight") -> Outputs:
        return {f"{prefix}ffn_gate_{kind}.{of}": ff, f"{prefix}ffn_up_{kind}.{of}": ff}

    def biases(tensors: Outputs, order: np.ndarray | None = None, factor: float = 1.0) -> jax.Array | None:
        return reader.vectors(tensors, experts.count, order, factor) if experts.biases else None

    return ExpertParams(
        router=jnp.asarray(reader.array(f"{prefix}ffn_gate_inp.weight", (experts.count, embed))),
        expert_gate_up=reader.matrices(gate_up("exps", experts.ff), experts.count, embed, _blocked(experts.ff)),
        expert_down=reader.matrices({f"{prefix}ffn_down_exps.weight": embed}, experts.count, experts.ff, factor=factor),
        shared_gate=reader.vector({f"{prefix}ffn_gate_inp_shexp.weight": embed}) if shared else None,
        shared_gate_up=reader.matrix(gate_up("shexp", shared), embed, _blocked(shared)) if shared else None,
        shared_down=reader.matrix({f"{prefix}ffn_down_shexp.weight": embed}, shared, factor=factor) if shared else None,
        router_bias=reader.vector({f"{prefix}ffn_gate_inp.bias": experts.count}) if experts.biases else None,
        expert_gate_up_bias=biases(gate_up("exps", experts.ff, "bias"), _blocked(experts.ff)),
        expert_down_bias=biases({f"{prefix}ffn_down_exps.bias": embed}, factor=factor),
    )


def _by_kv_head(config: ModelConfig, head_order: np.ndarray) -> np.ndarray:
    """Order of the outputs of q, k and v that `LayerParams.qkv` has; files have a head's gate behind its query."""
    heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    rows = np.arange(config.qkv_heads * dim).reshape(-1, dim)
    q, k, v = np.split(rows, [config.qkv_heads - 2 * kv_heads, config.qkv_heads - kv_heads])
    q, *gate = np.swapaxes(q.reshape(heads, -1, dim), 0, 1)
    parts = [q[:, head_order], k[:, head_order], v, *gate]
    return np.concatenate([part.reshape(kv_heads, -1) for part in parts], axis=1).reshape(-1)


def _by_block(config: ModelConfig) -> np.ndarray | None:
    """Order of the outputs of gate and up that `LayerParams.gate_up` has."""
    return _blocked(config.ff) if config.gated else None


def _head_order(config: ModelConfig, rope: RopeConfig) -> np.ndarray:
    """Order of the dimensions of query and key heads in which rotated pairs are (i, i + dims/2), as in the kernels."""
    dim, rotating = config.head_dim, np.arange(rope.dims)
    if not rope.interleaved:
        return np.arange(dim)
    return np.concatenate([rotating[0::2], rotating[1::2], np.arange(rope.dims, dim)])


def _blocked(ff: int) -> np.ndarray:
    """Order of the outputs of a gate and then of an up in which a block of the one and of the other take turns."""
    return np.arange(2 * ff).reshape(2, -1, columns_together(ff)).swapaxes(0, 1).reshape(-1)
