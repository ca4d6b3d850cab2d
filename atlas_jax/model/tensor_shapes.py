"""What would be made of a model's tensors, without reading one: the same names, shapes and refusals as `loading` has."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from atlas_jax.aot import shape as described
from atlas_jax.config import ModelConfig, WeightDtype
from atlas_jax.gguf import ModelFile, TensorType
from atlas_jax.gguf._types import BLOCKS, as_floats
from atlas_jax.kernels.linear import PackedArray, QuantArray, Weight
from atlas_jax.model.families._family import UnsupportedModel
from atlas_jax.model.loading import load_params
from atlas_jax.model.params import ModelParams
from atlas_jax.model.tensor_reader import Outputs, TensorReader

_BLOCK = 64
"""Inputs of a record of a packed matrix, and its bytes."""
_RECORD = 40


def loaded_shapes(file: ModelFile, config: ModelConfig, *, dtype: WeightDtype = "int8") -> ModelParams:
    """Shapes and types of the parameters that `load_params` would make of a file.

    Values are not looked at, so one that is not finite is found by loading alone.

    Raises:
      UnsupportedModel: a tensor is missing, unknown, misshapen or of a type that cannot be unpacked; the message names it.
    """
    return load_params(file, config, dtype=dtype, read=_ShapeReader)


class _ShapeReader(TensorReader):
    """Takes tensors as `TensorReader` does; small ones are zeros, matrices are shapes."""

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self._take(name, shape)
        _check_type(name, self._file.tensors[name].ggml_type)
        return np.broadcast_to(np.zeros((), np.float32), shape)  # one number, however large the tensor is

    def matrix(self, tensors: Outputs, inner: int, order: np.ndarray | None = None, factor: float = 1.0) -> Weight:
        outputs = sum(tensors.values()) if order is None else len(order)
        packed = self._packed.issuperset(tensors)
        for name, size in tensors.items():
            (self._take if packed else self.array)(name, (size, inner))
        if packed:
            blocks = described((outputs, inner // _BLOCK, _RECORD), np.uint8)
            return PackedArray(blocks, described((outputs,), np.float32))
        return self._weight((), outputs, inner)

    def matrices(
        self, tensors: Outputs, count: int, inner: int, order: np.ndarray | None = None, factor: float = 1.0
    ) -> QuantArray | jax.Array:
        for name, size in tensors.items():
            self.array(name, (count, size, inner))
        outputs = sum(tensors.values()) if order is None else len(order)
        weight: Any = self._weight((count,), outputs, inner)
        return weight

    def _weight(self, leading: tuple[int, ...], outputs: int, inner: int) -> Any:
        if self._dtype == "float32":
            return described((*leading, outputs, inner), np.float32)
        values = described((*leading, outputs, inner), np.int8)
        return QuantArray(values, described((*leading, outputs), np.float32))


def _check_type(name: str, kind: TensorType) -> None:
    """Raises UnsupportedModel for a tensor type whose blocks cannot be unpacked."""
    _, size = BLOCKS[kind]
    try:
        as_floats(kind, np.zeros((1, size), np.uint8))
    except NotImplementedError:
        raise UnsupportedModel(f"tensor '{name}' is of type {kind.name}, which cannot be dequantised") from None
