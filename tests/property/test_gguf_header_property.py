"""No byte string makes the header scan fail with anything but a `GGUFError`, or run for long."""

from __future__ import annotations

import struct
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.gguf import GGUFError
from atlas_jax.gguf._header import scan_header


def valid_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32("llama.block_count", 2)
        writer.add_bool("flag", True)
        writer.add_float64("number", 0.5)
        writer.add_string("text", "żółć")
        writer.add_array("texts", ["a", "bb", ""])
        writer.add_array("numbers", [1, 2, 3])
        writer.add_tensor("a", np.ones((2, 3), np.float32))
        writer.add_tensor("b", np.zeros((4, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


VALID = valid_file()
NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])

edits = st.one_of(
    st.tuples(st.just("set"), st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("set"), st.integers(0, len(VALID) - 1), NUMBERS.map(lambda n: struct.pack("<Q", n))),
    st.tuples(st.just("set"), st.integers(0, len(VALID) - 1), NUMBERS.map(lambda n: struct.pack("<I", n % 2**32))),
    st.tuples(st.just("insert"), st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("cut"), st.integers(0, len(VALID) - 1), st.binary(max_size=60)),
    st.tuples(st.just("end"), st.integers(0, len(VALID) - 1), st.just(b"")),
)


def mutated(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, value in changes:
        if kind == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + len(value) :]
        else:
            data = data[:at]
    return data


def scans(data: bytes) -> None:
    start = time.process_time()
    message = ""
    try:
        header = scan_header(data)
        assert all(info.offset + info.nbytes <= len(data) for info in header.tensors.values())
    except GGUFError as error:
        message = str(error)
    assert len(message) < 400
    assert message.isprintable()
    assert time.process_time() - start < 2


@settings(max_examples=600, deadline=None)
@given(st.lists(edits, min_size=1, max_size=4))
def test_a_damaged_file(changes: list[tuple[str, int, bytes]]) -> None:
    scans(mutated(VALID, changes))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_anything(data: bytes) -> None:
    scans(data)
    scans(b"GGUF\3\0\0\0" + data)


def test_every_truncation_and_every_byte() -> None:
    for end in range(len(VALID)):
        scans(VALID[:end])
    for at in range(len(VALID)):
        for value in (0, 1, 0x7F, 0xFF):
            scans(VALID[:at] + bytes([value]) + VALID[at + 1 :])
