"""One layer's parameters from the tensors of a file: which they are, and the order in which kernels want their outputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import DeltaNetConfig, ExpertsConfig, LayerConfig, ModelConfig, RopeConfig, columns_together
from atlas_jax.kernels.linear import InterleavedArray, PackedArray, QuantArray, Weight
from atlas_jax.model.key_balance import balanced, key_balance
from atlas_jax.model.params import DeltaParams, ExpertParams, LayerParams
from atlas_jax.model.tensor_reader import Outputs, TensorReader


def read_layer(reader: TensorReader, config: ModelConfig, index: int) -> LayerParams:
    """Takes the tensors of a layer; raises UnsupportedModel for one that is missing or misshapen."""
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
