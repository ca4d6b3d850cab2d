"""The log of steps: each call of process 0's runner as the others read it.

What a call makes, a row, the steps of a chunk or an embedding so far, has a number that process 0 gives; -1 is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from atlas_jax.engine.runner.base import NewPage
from atlas_jax.engine.sessions.lora import LoraScales

Arrays = list[np.ndarray]
NONE = -1

Compiled = Literal[
    "compile_prefill",
    "compile_scored_prefill",
    "compile_pooled_prefill",
    "compile_decode",
    "compile_plain_decode",
    "compile_monolithic_step",
    "compile_row_moves",
]


class _Call(Struct, frozen=True, array_like=True, tag=True):
    """One call; its fields are the arguments of the method of `ModelRunner`."""


class NewRow(_Call, frozen=True):
    """`new_row`."""

    row: int
    pages: int
    lora: LoraScales


class ResumeRow(_Call, frozen=True):
    """`resume_row`, of a row that has a number, or of one whose arrays are sent: it was at rest in process 0's memory."""

    row: int
    saved: int
    arrays: Arrays
    with_memory: bool
    pages: int
    position: int
    slot: int


class PrefixRow(_Call, frozen=True):
    """`prefix_row`."""

    row: int
    of: int


class SaveRow(_Call, frozen=True):
    """`save_row`. What is saved comes back with `ResumeRow`, so nobody but process 0 keeps it."""

    row: int
    pages: int
    position: int
    slot: int


class Prefill(_Call, frozen=True):
    """`prefill`, of which nothing runs before `Next`."""

    steps: int
    row: int
    settings: Arrays
    tokens: list[int]
    page: NewPage | None


class PrefillScored(_Call, frozen=True):
    """`prefill_scored`, otherwise as `Prefill`."""

    steps: int
    row: int
    settings: Arrays
    tokens: list[int]
    following: list[int]
    page: NewPage | None
    alternatives: bool


class PrefillPooled(_Call, frozen=True):
    """`prefill_pooled`, otherwise as `Prefill`; `pooled` has a number or, for the first chunk, is `zeros` numbers of 0."""

    steps: int
    row: int
    settings: Arrays
    tokens: list[int]
    pooled: int
    zeros: int
    page: NewPage | None
    mean: bool


class Next(_Call, frozen=True):
    """The next step of a chunk: what its row, and the embedding so far, are called from now on."""

    steps: int
    row: int
    pooled: int


class Resize(_Call, frozen=True):
    """`resize`."""

    rows: int
    pages: int
    moves: dict[int, int]


class Insert(_Call, frozen=True):
    """`insert`."""

    index: int
    row: int
    token: int
    text: np.ndarray
    sampling: Arrays
    settings: Arrays
    with_memory: bool


class Extract(_Call, frozen=True):
    """`extract`."""

    row: int
    index: int


class Decode(_Call, frozen=True):
    """`decode`."""

    wanted: np.ndarray
    allowed: np.ndarray | None
    pages: dict[int, NewPage]
    width: int


class Compile(_Call, frozen=True):
    """One of the methods that compile ahead, in the background."""

    method: Compiled
    arguments: list[int]


class End(_Call, frozen=True):
    """There is nothing more to come."""


Call = (
    NewRow
    | ResumeRow
    | PrefixRow
    | SaveRow
    | Prefill
    | PrefillScored
    | PrefillPooled
    | Next
    | Resize
    | Insert
    | Extract
    | Decode
    | Compile
    | End
)


class Entry(Struct, frozen=True, array_like=True):
    """A call, and the numbers that process 0 has no more use for."""

    dropped: list[int]
    call: Call


class Hello(Struct, frozen=True):
    """What all processes must have in common, by name: process 0's."""

    facts: dict[str, str]


class Answer(Struct, frozen=True):
    """Why a process cannot follow, or nothing."""

    refusal: str = ""


def arrays_of(value: Any) -> Arrays:
    """The fields of a dataclass of arrays, as NumPy's."""
    return [np.asarray(getattr(value, field.name)) for field in dataclasses.fields(value)]


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    if isinstance(value, Iterable):
        return list(value)
    raise NotImplementedError(f"{type(value).__name__} cannot be sent")


def _from_plain(kind: type, value: Any) -> Any:
    assert kind is np.ndarray, kind
    dtype, shape, data = value
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_plain)
_entries = msgspec.msgpack.Decoder(Entry, dec_hook=_from_plain)


def encode(message: Entry | Hello | Answer) -> bytes:
    """A message as it is sent."""
    return _encoder.encode(message)


def decode_entry(data: bytes) -> Entry:
    """An entry of the log."""
    return _entries.decode(data)
