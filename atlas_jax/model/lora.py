"""LoRA adapters beside a model's weights: what `loading` does with a weight is done with what an adapter adds to it.

Adapters are read through the same functions as the weights, so they come in the same order and with the same factors, and a
weight that a model has under another name, or not at all, is found out in the same places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from atlas_jax.config import ModelConfig, WeightDtype
from atlas_jax.gguf import ModelFile
from atlas_jax.kernels.linear import QuantArray, Weight, quantize_weight
from atlas_jax.kernels.low_rank import LowRank
from atlas_jax.kernels.weight_forms import Form
from atlas_jax.model.loading import EMBED, load_params
from atlas_jax.model.lora_file import LoraError, LoraFile, LoraPair
from atlas_jax.model.params import LayerLora, ModelParams
from atlas_jax.model.tensor_reader import Outputs, TensorReader

_COLUMNS = 64
"""Columns come in multiples of this: what the C kernels take."""


def with_adapters(
    params: ModelParams,
    file: ModelFile,
    config: ModelConfig,
    adapters: Sequence[LoraFile],
    *,
    dtype: WeightDtype = "int8",
) -> ModelParams:
    """The parameters, and beside them what adapters add.

    Args:
      params, file, config: the model's.
      dtype: "int8" keeps the thin matrices in 8 bits, whose products are exact in the integers, as other weights do.

    Raises:
      LoraError: an adapter is for another model, or changes what cannot be changed so; the message names file and tensor.
    """
    found = _additions(file, config, adapters)
    roles = {
        field.name: [_part(layer, field.name) for layer in found.layers] for field in dataclasses.fields(LayerLora)
    }
    columns = {role: _Columns(parts, len(adapters), dtype) for role, parts in roles.items()}

    def lora(index: int) -> LayerLora:
        return LayerLora(**{role: columns[role].low_rank(parts[index]) for role, parts in roles.items()})

    def end(part: Any) -> LowRank | None:
        return None if part is None else _Columns([part], len(adapters), dtype).low_rank(part)

    return dataclasses.replace(
        params,
        layers=tuple(dataclasses.replace(layer, lora=lora(index)) for index, layer in enumerate(params.layers)),
        embed_lora=end(found.embed),
        head_lora=end(found.head),
    )


def check_adapter(adapter: LoraFile, file: ModelFile, config: ModelConfig) -> None:
    """Raises LoraError where `with_adapters` would."""
    _additions(file, config, [adapter])


def _additions(file: ModelFile, config: ModelConfig, adapters: Sequence[LoraFile]) -> ModelParams:
    """The model's parameters with `_Additions` in place of its weights; raises LoraError."""
    for one in adapters:
        architecture = file.metadata.get("general.architecture")
        if one.architecture != architecture:
            raise LoraError(
                f"LoRA adapter {one.name}: it is for architecture {one.architecture!r}, not {architecture!r}"
            )
    taken = [set[str]() for _ in adapters]
    read = functools.partial(_LoraReader, adapters=adapters, taken=taken)
    found = load_params(file, config, dtype="float32", read=read)
    experts = {name for layer in found.layers for name in _of_experts(layer.experts)}
    for one, names in zip(adapters, taken, strict=True):
        left = sorted(one.pairs.keys() - (names - experts))
        if left:
            why = "cannot be adapted" if left[0] in file.tensors else "is no weight of this model"
            raise LoraError(f"LoRA adapter {one.name}: tensor '{left[0]}' {why}")
    return found


@dataclass(frozen=True)
class _Additions:
    """What adapters add to a weight that is made of some tensors.

    Attributes:
      shape: of the weight, before its outputs are ordered.
      pairs: of each adapter, with the output where each begins.
      table: the weight is looked up by rows: of each pair `a` has the weight's rows.
    """

    shape: tuple[int, int]
    names: tuple[str, ...]
    pairs: tuple[tuple[tuple[int, LoraPair], ...], ...]
    order: np.ndarray | None
    factor: float
    table: bool = False

    def ranks(self) -> list[int]:
        """Columns that each adapter needs."""
        return [sum(pair.b.shape[1] for _, pair in pairs) for pairs in self.pairs]


class _LoraReader(TensorReader):
    """Takes tensors as `TensorReader` does; weights are what adapters add to them, everything else is zeros."""

    def __init__(
        self,
        file: ModelFile,
        dtype: WeightDtype,
        forms: Mapping[str, Form],
        left_out: Collection[str],
        *,
        adapters: Sequence[LoraFile],
        taken: Sequence[set[str]],
    ) -> None:
        super().__init__(file, dtype, forms, left_out)
        self._adapters, self._names = adapters, taken

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self._take(name, shape)
        return np.broadcast_to(np.zeros((), np.float32), shape)

    def vocabulary(self, name: str, config: ModelConfig) -> Weight:
        if name != EMBED:
            return super().vocabulary(name, config)
        shape = self._file.tensors[name].shape
        self._take(name, (shape[0], config.embed))
        order = np.arange(config.vocab)
        pairs = self._pairs({name: config.embed}, shape[0], table=True)
        return _Additions((config.embed, shape[0]), (name,), pairs, order, 1.0, table=True)  # type: ignore[return-value]

    def matrix(self, tensors: Outputs, inner: int, order: np.ndarray | None = None, factor: float = 1.0) -> Weight:
        for name, size in tensors.items():
            self._take(name, (size, inner))
        shape = sum(tensors.values()), inner
        return _Additions(shape, tuple(tensors), self._pairs(tensors, inner), order, factor)  # type: ignore[return-value]

    def matrices(
        self, tensors: Outputs, count: int, inner: int, order: np.ndarray | None = None, factor: float = 1.0
    ) -> Weight:
        for name, size in tensors.items():
            self._take(name, (count, size, inner))
        return _Additions((0, 0), (), (), None, 1.0)  # type: ignore[return-value]

    def _pairs(self, tensors: Outputs, inner: int, *, table: bool = False) -> Any:
        found = []
        for adapter, names in zip(self._adapters, self._names, strict=True):
            own, start = [], 0
            for name, size in tensors.items():
                if name in adapter.pairs:
                    names.add(name)
                    _check_shapes(adapter, name, (size, inner), table=table)
                    own.append((start, adapter.pairs[name]))
                start += size
            found.append(tuple(own))
        return tuple(found)


def _check_shapes(adapter: LoraFile, name: str, shape: tuple[int, int], *, table: bool) -> None:
    """Raises LoraError unless the pair's product has the shape of the weight, [out, in]."""
    pair, (outputs, inner) = adapter.pairs[name], shape
    rank = pair.b.shape[1]
    wanted = {".lora_a": (inner, rank) if table else (rank, inner), ".lora_b": (outputs, rank)}
    for part, values in ((".lora_a", pair.a), (".lora_b", pair.b)):
        if values.shape != wanted[part]:
            raise LoraError(
                f"LoRA adapter {adapter.name}: tensor '{name}{part}' has shape {values.shape}, expected {wanted[part]}"
            )


class _Columns:
    """The columns that adapters have in one weight of every layer: as many in all layers, which share their programs."""

    def __init__(self, parts: Sequence[_Additions | None], adapters: int, dtype: WeightDtype) -> None:
        ranks = [part.ranks() for part in parts if part is not None] or [[0] * adapters]
        self._ranks = [max(each) for each in zip(*ranks, strict=True)]
        self._dtype = dtype
        self._none: dict[tuple[int, int], LowRank] = {}

    def low_rank(self, part: _Additions | None) -> LowRank | None:
        """What is added to one; None where nothing is added to any."""
        if part is None or not any(self._ranks):
            return None
        if any(part.pairs):
            return self._made(part)
        return self._none.setdefault(part.shape, self._made(part))

    def _made(self, part: _Additions) -> LowRank:
        total = -(-sum(self._ranks) // _COLUMNS) * _COLUMNS
        outputs, inner = part.shape
        a, b = np.zeros((total, inner), np.float32), np.zeros((outputs, total), np.float32)
        gain, owner = np.zeros(total, np.float32), np.zeros(total, np.int32)
        first = 0
        for index, (pairs, room) in enumerate(zip(part.pairs, self._ranks, strict=True)):
            owner[first : first + room] = index
            at = first
            for start, pair in pairs:
                columns = slice(at, at + pair.b.shape[1])
                a[columns] = pair.a.T if part.table else pair.a
                b[start : start + len(pair.b), columns] = pair.b
                gain[columns] = pair.gain * part.factor
                at = columns.stop
            first += room
        if part.table:
            a = a.T[part.order]
            size = np.abs(a).max(axis=0, initial=0.0)
            a, gain = _divided(a, size), gain * size
        elif part.order is not None:
            b = b[part.order]
        size = np.abs(b).max(axis=0, initial=0.0)
        return LowRank(self._stored(a), self._stored(_divided(b, size)), jnp.asarray(gain * size), jnp.asarray(owner))

    def _stored(self, matrix: np.ndarray) -> Weight:
        if self._dtype == "float32":
            return jnp.asarray(matrix)
        values, scale = quantize_weight(matrix)
        return QuantArray(jnp.asarray(values), jnp.asarray(scale))


def _divided(matrix: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Columns by their sizes; those of zeros stay."""
    return matrix / np.where(size > 0, size, 1)


def _part(layer: Any, role: str) -> Any:
    """What a layer has under a name of `LayerLora`."""
    if role == "project":
        return None if layer.delta is None else layer.delta.project
    return getattr(layer, role)


def _of_experts(experts: Any) -> tuple[str, ...]:
    """Names of a layer's tensors that all tokens use beside its experts: they have no place for an adapter."""
    if experts is None or experts.shared_gate_up is None:
        return ()
    names: tuple[str, ...] = (*experts.shared_gate_up.names, *experts.shared_down.names)
    return names
