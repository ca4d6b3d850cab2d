"""Tensors of a GGUF file as weights: each is asked for by name and shape, and none is left unasked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import ModelConfig, WeightDtype
from atlas_jax.gguf import Floats4, Levels4, ModelFile
from atlas_jax.kernels.linear import (
    PackedArray,
    QuantArray,
    Weight,
    pack_floats,
    pack_levels,
    pack_weight,
    quantize_weight,
)
from atlas_jax.kernels.weight_forms import FLOATS4_LARGEST, Form, NotFinite, pack_rows
from atlas_jax.model.families._family import UnsupportedModel

Outputs = Mapping[str, int]
"""Names of tensors, and how many outputs each has; what is made of them has those of the first, then of the second, …"""


class TensorReader:
    """Takes tensors by name, checks shapes, and remembers what was taken."""

    def __init__(
        self, file: ModelFile, dtype: WeightDtype, forms: Mapping[str, Form], left_out: Collection[str]
    ) -> None:
        """Reads nothing yet.

        Args:
          forms: of the matrices that stay in fewer bits than 8, by name.
          left_out: names of tensors that nobody needs to take.
        """
        self._file = file
        self._dtype = dtype
        self._forms = forms
        self._taken = set(left_out)

    def stacked(self, whole: str, parts: Outputs) -> Outputs:
        """The tensor `whole`, if the file has the outputs of all parts in it, or the parts."""
        outputs = sum(parts.values())
        info = self._file.tensors.get(whole)
        return parts if info is None or info.shape[0] != outputs else {whole: outputs}

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._file.tensors

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as float32."""
        self._take(name, shape)
        values = self._file.dequantize(name)
        self._release([name])
        _check_finite(name, values)
        return values

    def vector(self, tensors: Outputs, order: np.ndarray | None = None, factor: float = 1.0) -> jax.Array:
        """Tensors one after the other, their numbers then put in `order` and multiplied."""
        values = np.concatenate([self.array(name, (size,)) for name, size in tensors.items()])
        return jnp.asarray((values if order is None else values[order]) * np.float32(factor))

    def vectors(self, tensors: Outputs, count: int, order: np.ndarray | None = None, factor: float = 1.0) -> jax.Array:
        """As `vector`, of tensors that have a leading axis of `count` vectors."""
        values = np.concatenate([self.array(name, (count, size)) for name, size in tensors.items()], axis=1)
        return jnp.asarray((values if order is None else values[:, order]) * np.float32(factor))

    def vocabulary(self, name: str, config: ModelConfig) -> Weight:
        """A matrix with a row for every token; rows past the last token, which can mean nothing, are not read."""
        rows = self._file.tensors[name].shape[0] if name in self._file.tensors else 0
        padded = max(rows, config.vocab)
        order = np.arange(config.vocab) if padded > config.vocab else None
        return self.matrix({name: padded}, config.embed, order)

    def matrix(self, tensors: Outputs, inner: int, order: np.ndarray | None = None, factor: float = 1.0) -> Weight:
        """Tensors stacked along their outputs, these then put in `order` and multiplied.

        They are quantised row by row, so neither the order nor the factor changes a number in 8 bits.

        Raises:
          UnsupportedModel: a tensor is missing, misshapen or holds what is not finite; the message names it.
        """
        shapes = {name: (size, inner) for name, size in tensors.items()}
        if (form := self.form(tensors)) is not None:
            return self._coded(form, shapes, order, factor)
        parts = [self.array(name, shape) for name, shape in shapes.items()]
        whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if order is not None:
            whole = whole[order]
        if self._dtype == "float32":
            return jnp.asarray(whole if factor == 1.0 else whole * np.float32(factor))
        values, scale = quantize_weight(whole)
        return QuantArray(jnp.asarray(values), jnp.asarray(scale * np.float32(factor)))

    def form(self, tensors: Outputs) -> Form | None:
        """What `matrix` makes of tensors: a form that all have, or of those with records of 256 weights the widest."""
        forms = {self._forms.get(name) for name in tensors}
        if len(forms) == 1:
            return forms.pop()
        wide = [form for form in forms if form is not None and form.span == 256]
        return max(wide, key=lambda form: form.value) if len(wide) == len(forms) else None

    def matrices(
        self, tensors: Outputs, count: int, inner: int, order: np.ndarray | None = None, factor: float = 1.0
    ) -> Weight:
        """As `matrix`, of tensors that have a leading axis of `count` matrices."""
        shapes = {name: (count, size, inner) for name, size in tensors.items()}
        if (form := self.form(tensors)) is not None:
            return self._coded(form, shapes, order, factor)
        whole = np.concatenate([self.array(name, shape) for name, shape in shapes.items()], axis=1)
        whole = whole if order is None else whole[:, order]
        if self._dtype == "float32":
            return jnp.asarray(whole * np.float32(factor))
        values, scale = quantize_weight(whole.reshape(-1, inner))
        scale = scale.reshape(whole.shape[:2]) * np.float32(factor)
        return QuantArray(jnp.asarray(values.reshape(whole.shape)), jnp.asarray(scale))

    def take(self, name: str) -> None:
        """Marks a tensor as understood."""
        self._taken.add(name)

    def finish(self) -> None:
        """Raises UnsupportedModel if a tensor of the file has not been taken; the message names it."""
        left = sorted(set(self._file.tensors) - self._taken)
        if left:
            raise UnsupportedModel(f"tensor '{left[0]}' is not understood")

    def _coded(
        self, form: Form, shapes: Mapping[str, tuple[int, ...]], order: np.ndarray | None, factor: float
    ) -> PackedArray:
        """Tensors in a form of fewer bits than 8, stacked along their outputs, as `matrix` does it."""
        leading = [shape[:-1] for shape in shapes.values()]
        ends = np.cumsum([np.prod(one) for one in leading])
        rows = [np.arange(end - np.prod(one), end).reshape(one) for one, end in zip(leading, ends, strict=True)]
        chosen = np.concatenate(rows, axis=-1)
        chosen = chosen if order is None else chosen[..., order]
        if form.span == 64:
            packed = [self._pack(name, shape) for name, shape in shapes.items()]
            blocks, scale = (np.concatenate(arrays) for arrays in zip(*packed, strict=True))
            return PackedArray(jnp.asarray(blocks[chosen]), jnp.asarray(scale[chosen] * np.float32(factor)), form)
        given = [(self._file.tensors[name].ggml_type, self._rows(name, shape)) for name, shape in shapes.items()]
        inner = next(iter(shapes.values()))[-1]
        try:
            records, scale = pack_rows(form, given, inner, chosen.reshape(-1), factor)
        except NotFinite:
            raise _not_finite(", ".join(shapes)) from None
        self._release(shapes)
        # not jnp.asarray, which copies
        blocks, scale = records.reshape(*chosen.shape, *records.shape[1:]), scale.reshape(chosen.shape)
        return PackedArray(jax.device_put(blocks), jax.device_put(scale), form)

    def _pack(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Records and scales of all rows of a tensor of 4-bit codes."""
        self._take(name, shape)
        nibbles = self._file.nibbles(name)
        self._release([name])
        if isinstance(nibbles, Floats4):
            blocks, scale = pack_floats(nibbles.codes, nibbles.exponent)
            with np.errstate(over="ignore"):
                _check_finite(name, scale * np.float32(FLOATS4_LARGEST))
            return blocks, scale
        if isinstance(nibbles, Levels4):
            _check_finite(name, nibbles.step)
            return pack_levels(nibbles.codes, nibbles.step)
        _check_finite(name, nibbles.step, nibbles.base)
        return pack_weight(nibbles.codes, nibbles.step, nibbles.base)

    def _rows(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self._take(name, shape)
        return self._file.raw(name).reshape(int(np.prod(shape[:-1])), -1)

    def _release(self, names: Iterable[str]) -> None:
        """Lets go of what has been read of the file: while a model is loaded, its file would be in memory a second time."""
        for name in names:
            self._file.release(name)

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        info = self._file.tensors.get(name)
        if info is None:
            raise UnsupportedModel(f"tensor '{name}' is missing")
        if tuple(info.shape) != shape:
            raise UnsupportedModel(f"tensor '{name}' has shape {tuple(info.shape)}, expected {shape}")
        self._taken.add(name)


def _check_finite(name: str, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise _not_finite(name)


def _not_finite(name: str) -> UnsupportedModel:
    return UnsupportedModel(f"tensor '{name}' holds values that are not finite")
