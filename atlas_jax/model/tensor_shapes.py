"""What would be made of a model's tensors, without reading one: the same names, shapes and refusals as `loading` has."""

from __future__ import annotations

from typing import Any

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
        return self._described((), tensors, inner, order)

    def matrices(
        self, tensors: Outputs, count: int, inner: int, order: np.ndarray | None = None, factor: float = 1.0
    ) -> Weight:
        return self._described((count,), tensors, inner, order)

    def _described(self, leading: tuple[int, ...], tensors: Outputs, inner: int, order: np.ndarray | None) -> Any:
        form = self.form(tensors)
        for name, size in tensors.items():
            (self.array if form is None else self._take)(name, (*leading, size, inner))
        rows = (*leading, sum(tensors.values()) if order is None else len(order))
        if form is not None:
            records = described((*rows, inner // form.span, form.value), np.uint8)
            return PackedArray(records, described(rows, np.float32), form)
        if self._dtype == "float32":
            return described((*rows, inner), np.float32)
        return QuantArray(described((*rows, inner), np.int8), described(rows, np.float32))


def _check_type(name: str, kind: TensorType) -> None:
    """Raises UnsupportedModel for a tensor type whose blocks cannot be unpacked."""
    _, size = BLOCKS[kind]
    try:
        as_floats(kind, np.zeros((1, size), np.uint8))
    except NotImplementedError:
        raise UnsupportedModel(f"tensor '{name}' is of type {kind.name}, which cannot be dequantised") from None
