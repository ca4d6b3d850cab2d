"""The bounded header scan: what a valid file yields, and what every kind of damage is called."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from atlas_jax.gguf import GGUFError
from atlas_jax.gguf._header import MAX_STRING_BYTES, scan_header

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 0, 4, 5, 6, 7, 8, 9, 10, 12


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*entries: bytes, tensors: int = 0, version: int = 3, keys: int | None = None) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries) if keys is None else keys) + b"".join(entries)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def with_tensors(*rows: bytes, data: int = 256, entries: tuple[bytes, ...] = ()) -> bytes:
    head = header(*entries, tensors=0)
    head = head[:8] + struct.pack("<Q", len(rows)) + head[16:] + b"".join(rows)
    return head + bytes(-len(head) % 32) + bytes(data)


def test_reads_every_type(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e300)
    writer.add_bool("yes", True)
    writer.add_string("text", "żółć 日本")
    writer.add_array("texts", ["a", "", "é"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("bools", [True, False])
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("h", np.ones((4, 2, 1), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    head = scan_header(data)

    expected = {"u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "yes": True}
    expected |= {"u64": 2**64 - 1, "i64": -(2**63), "f32": 0.5, "f64": 1e300, "text": "żółć 日本"}
    assert {name: head.metadata[name] for name in expected} == expected
    assert head.metadata["texts"] == ["a", "", "é"]
    assert head.metadata["ints"].tolist() == [1, -2, 3]
    assert head.metadata["floats"].tolist() == [0.5, 1.5]
    assert head.metadata["bools"].dtype == np.bool_
    assert not head.metadata["ints"].flags.writeable
    w = head.tensors["w"]
    assert (w.shape, w.nbytes) == ((2, 3), 24)
    assert np.frombuffer(data, "<f4", 6, w.offset).tolist() == list(range(6))
    assert head.tensors["h"].shape == (4, 2, 1)


def test_reads_version_2_and_an_unpadded_file() -> None:
    assert scan_header(header(key(b"a", U8, b"\7"), version=2)).metadata == {"a": 7}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "magic at offset 0 needs 4 bytes, 0 are left"),
        (b"GGML" + bytes(20), "no GGUF file"),
        (header(version=1), "version at offset 4 is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version at offset 4 is big-endian"),
        (header()[:12], "number of tensors at offset 8 needs 8 bytes"),
        (header(tensors=2**62), "number of tensors at offset 8 is 4611686018427387904"),
        (header(keys=2**20), "number of keys at offset 16 is 1048576"),
        (header(keys=1), "length of key 0 at offset 24 needs 8 bytes, 0 are left"),
        (header(struct.pack("<Q", 2**63)), "key 0 at offset 24 has 9223372036854775808 bytes, more than"),
        (header(struct.pack("<Q", 100)), "key 0 at offset 32 needs 100 bytes, 0 are left"),
        (header(text(b"\xff")), "key 0 at offset 32 is not UTF-8"),
        (header(key(b"k", 99, b"")), "type of key 'k' at offset 33 is 99"),
        (header(key(b"k", U32, b"\0")), "value of key 'k' at offset 37 needs 4 bytes, 1 are left"),
        (header(key(b"k", BOOL, b"\2")), "value of key 'k' at offset 37 is a bool that is neither"),
        (header(key(b"k", STRING, text(b"\xc3("))), "value of key 'k' at offset 45 is not UTF-8"),
        (header(key(b"k", STRING, struct.pack("<Q", MAX_STRING_BYTES + 1))), "value of key 'k' at offset 37 has"),
        (header(key(b"k", ARRAY, array(77, 1))), "element type of value of key 'k' at offset 37 is 77"),
        (header(key(b"k", ARRAY, array(ARRAY, 1))), "value of key 'k' at offset 37 is an array of arrays"),
        (header(key(b"k", ARRAY, array(U8, 2**62))), "claims 4611686018427387904 elements of at least 1 bytes"),
        (header(key(b"k", ARRAY, array(F64, 2, bytes(15)))), "claims 2 elements of at least 8 bytes"),
        (header(key(b"k", ARRAY, array(STRING, 2, text(b"abcdefgh")))), "element 1 of value of key 'k' .* needs 8"),
        (header(key(b"k", ARRAY, array(STRING, 1, text(b"\xff")))), "element 0 of value of key 'k' .* not UTF-8"),
        (header(key(b"k", ARRAY, array(BOOL, 1, b"\3"))), "holds a bool that is neither"),
        (header(key(b"k", U8, b"\0"), key(b"k", U8, b"\0")), "key 'k' at offset 38 appears twice"),
        (header(key(b"general.alignment", U32, struct.pack("<I", 24))), "general.alignment is 24"),
        (header(key(b"general.alignment", U32, struct.pack("<I", 0))), "general.alignment is 0"),
        (header(key(b"general.alignment", U32, struct.pack("<I", 1 << 21))), "general.alignment is 2097152"),
        (header(key(b"general.alignment", BOOL, b"\1")), "general.alignment is True"),
        (with_tensors(tensor(b"t", ())), "tensor 't' at offset 33 has 0 dimensions"),
        (with_tensors(tensor(b"t", (1, 1, 1, 1, 1))), "tensor 't' at offset 33 has 5 dimensions"),
        (with_tensors(tensor(b"t", (4, 0))), "tensor 't' at offset 33 has the impossible dimensions"),
        (with_tensors(tensor(b"t", (2**32, 2**32))), "tensor 't' at offset 33 has the impossible dimensions"),
        (with_tensors(tensor(b"t", (4,), kind=5)), "tensor 't' at offset 45 has unknown GGML type 5"),
        (with_tensors(tensor(b"t", (33,), kind=2)), "rows of 33, no multiple of Q4_0's 32"),
        (with_tensors(tensor(b"t", (4,), offset=4)), "tensor 't' has the offset 4, which is not aligned to 32"),
        (with_tensors(tensor(b"t", (1000,))), "tensor 't' needs bytes 64 to 4064, the file has 320"),
        (with_tensors(tensor(b"t", (4,), offset=2**62)), "tensor 't' needs bytes"),
        (with_tensors(tensor(b"t", (2**61,))), "tensor 't' needs bytes"),
        (with_tensors(tensor(b"t", (4,)), tensor(b"t", (4,))), "tensor 't' at offset 57 appears twice"),
        (with_tensors(tensor(b"\xfe", (4,))), "name of tensor 0 at offset 32 is not UTF-8"),
        (with_tensors(tensor(b"t" * 200, (4,), kind=5)), "tensor 't{77}\\.\\.\\.' at offset"),
        (with_tensors(tensor(b"a\nb\x1b[0m", (4,), kind=5)), r"tensor 'a\\nb\\x1b\[0m' at offset"),
    ],
)
def test_names_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        scan_header(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: header(key(b"k", ARRAY, array(U8, 2**62))),
        lambda: header(key(b"k", ARRAY, array(STRING, 1 << 23, bytes(8 << 23)))),
        lambda: header(key(b"k", ARRAY, array(STRING, 2**60, bytes(8 << 10)))),
    ],
)
def test_claims_cost_no_time(make: Callable[[], bytes]) -> None:
    data = make()
    start = time.process_time()
    with pytest.raises(GGUFError):
        scan_header(data)
    assert time.process_time() - start < 1
