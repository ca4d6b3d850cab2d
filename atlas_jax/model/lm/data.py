"""Training data: a function from step to batch, or any iterator of batches or token arrays; and documents packed in rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from atlas_jax.typing import Array, Bool, Int32

IGNORE = -1
"""A target that counts for nothing."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Inputs and what should follow each of them.

    Attributes:
      targets: the next token, or `IGNORE` where none is asked for.
      starts: tokens that begin a document, before which the model forgets all; None where each row is one text.
    """

    tokens: Int32[Array | np.ndarray, "B T"]
    targets: Int32[Array | np.ndarray, "B T"]
    starts: Bool[Array | np.ndarray, "B T"] | None = None


BatchSource = Callable[[int], Batch]
"""step → batch: a run can stop and go on anywhere."""

Source = BatchSource | Iterable[Any]
"""A `BatchSource`; or anything to be iterated over (a Grain loader, a generator), of batches or of token arrays [B, T + 1].
An iterator is taken from the front, so a run that goes on takes off it what it has had."""


def text_batches(text: bytes, *, batch: int, length: int, seed: int) -> BatchSource:
    """Random windows of a text, its bytes as tokens.

    Raises:
      ValueError: the text is shorter than a window.
    """
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    if len(tokens) <= length:
        raise ValueError(f"the text has {len(tokens)} bytes, fewer than a window of {length} and one more")

    def at(step: int) -> Batch:
        start = np.random.default_rng((seed, step)).integers(0, len(tokens) - length, batch)
        windows = tokens[start[:, None] + np.arange(length + 1)]
        return Batch(windows[:, :-1], windows[:, 1:])

    return at


def pack(documents: Iterable[npt.ArrayLike], *, batch: int, length: int, step: int) -> Iterator[Batch]:
    """Documents one behind the other in rows, each padded to where the next may begin; what is left at the end is dropped.

    A document that does not fit goes on in the next row, where the model has forgotten its beginning. Nothing is asked for
    after the last token of a document, or in padding.

    Args:
      documents: token ids of each, at least two.
      step: what beginnings are multiples of, `LMConfig.document_step`.

    Raises:
      ValueError: `length` is not a multiple of `step`, or a document has no second token.
    """
    if length % step:
        raise ValueError(f"length {length} must be a multiple of {step}, where documents may begin")
    rows: list[np.ndarray] = []
    left = np.zeros((0, 3), np.int32)
    for number, document in enumerate(documents):
        tokens = np.asarray(document, np.int32)
        if tokens.ndim != 1 or len(tokens) < 2:
            raise ValueError(f"document {number} has shape {tokens.shape}; it needs one axis and two tokens")
        columns = np.zeros((-(-(len(tokens) - 1) // step) * step, 3), np.int32)
        columns[:, 1] = IGNORE
        columns[: len(tokens) - 1, 0], columns[: len(tokens) - 1, 1] = tokens[:-1], tokens[1:]
        columns[0, 2] = 1
        left = np.concatenate([left, columns])
        while len(left) >= length:
            row, left = left[:length], left[length:]
            rows.append(row)
            if len(rows) == batch:
                stacked = np.stack(rows)
                yield Batch(stacked[..., 0], stacked[..., 1], stacked[..., 2] > 0)
                rows = []


def batches_from(source: Source, first: int) -> BatchSource:
    """Any source as a function of the step, for steps from `first` on, each asked for once and in order.

    Raises:
      ValueError: an iterator gives something else, or ends; the message says at which step.
    """
    if not isinstance(source, Iterable):
        return source
    iterator = iter(source)
    for _ in range(first):
        next(iterator, None)

    def at(step: int) -> Batch:
        found = next(iterator, None)
        if isinstance(found, Batch):
            return found
        if found is None:
            raise ValueError(f"the source of batches ended before step {step}")
        tokens = np.asarray(found)
        if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"step {step}: batches are `Batch`es or token arrays [B, T + 1], got {tokens.dtype} {tokens.shape}"
            )
        tokens = tokens.astype(np.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:])

    return at
