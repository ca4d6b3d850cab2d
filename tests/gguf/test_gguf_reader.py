"""Opening GGUF files, and unpacking their tensors."""

from __future__ import annotations

import hashlib
import os
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from atlas_jax.gguf import GGUFError, GGUFFile

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def write(path: Path, *, rows: int = 6, width: int = 512) -> dict[str, np.ndarray]:
    """One tensor of every type, with plausible blocks: random bytes with finite scales."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_array("names", ["a", "b"])
    expected = {}
    for name in [*TYPES, "Q8_K", "I32"]:
        kind = GGMLQuantizationType[name]
        if name == "F32":
            packed = rng.normal(size=(rows, width)).astype(np.float32).view(np.uint8)
        elif name == "F16":
            packed = rng.normal(size=(rows, width)).astype(np.float16).view(np.uint8)
        elif name == "BF16":
            packed = (rng.normal(size=(rows, width)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            packed = packed.view(np.uint8)
        else:
            block, size = GGML_QUANT_SIZES[kind]
            packed = rng.integers(0, 60, (rows, width // block * size), np.uint8)
        writer.add_tensor(name, packed, raw_dtype=kind)
        if name in ("F32", "F16"):
            expected[name] = packed.view(np.float32 if name == "F32" else np.float16)
        elif name in TYPES:
            expected[name] = quants.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def sample(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path / "sample.gguf"
    return path, write(path)


@pytest.mark.parametrize("name", TYPES)
def test_dequantizes(sample: tuple[Path, dict[str, np.ndarray]], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = sample
    monkeypatch.setattr("atlas_jax.gguf._reader._CHUNK", 2000)  # a few rows at a time
    with GGUFFile.open(path) as file:
        assert file.tensors[name].shape == (6, 512)
        values = file.dequantize(name)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected[name].astype(np.float32))
        assert file.dequantize(name, np.float16).dtype == np.float16


@pytest.mark.parametrize("name", TYPES)
def test_four_bit_codes_are_what_the_floats_are_made_of(sample: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    path, expected = sample
    with GGUFFile.open(path) as file:
        assert file.has_nibbles(name) == (name in ("Q4_0", "Q4_1", "Q4_K"))
        if not file.has_nibbles(name):
            return
        found = file.nibbles(name)
    assert found.codes.max() <= 15
    blocks = found.codes.reshape(*found.step.shape, 32) * found.step[..., None] + found.base[..., None]
    np.testing.assert_allclose(blocks.reshape(expected[name].shape), expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Q8_K", "I32"])
def test_names_a_type_it_cannot_unpack(sample: tuple[Path, object], name: str) -> None:
    with GGUFFile.open(sample[0]) as file, pytest.raises(GGUFError, match=f"tensor '{name}' is of type {name}"):
        file.dequantize(name)


def test_raw_is_a_read_only_view(sample: tuple[Path, object]) -> None:
    with GGUFFile.open(sample[0]) as file:
        info = file.tensors["Q4_0"]
        blocks = file.raw("Q4_0")
        assert blocks.tobytes() == sample[0].read_bytes()[info.offset : info.offset + info.nbytes]
        assert not blocks.flags.writeable
        assert blocks.base is not None
        with pytest.raises(GGUFError, match="no tensor 'nope'"):
            file.raw("nope")


def test_unpacking_needs_little_more_than_the_result(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.zeros((8192, 34 * 64), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        tracemalloc.start()
        values = file.dequantize("w")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert values.nbytes == 64 << 20
    assert peak < 1.7 * values.nbytes


def test_fingerprint_is_that_of_the_file(sample: tuple[Path, object]) -> None:
    with GGUFFile.open(sample[0]) as file:
        assert file.fingerprint() == hashlib.sha256(sample[0].read_bytes()).hexdigest()


def test_typed_access(sample: tuple[Path, object]) -> None:
    with GGUFFile.open(sample[0]) as file:
        assert file.require("llama.block_count", int) == 3
        assert file.require("llama.rope.freq_base", float) == 1e4
        assert file.require("names", list) == ["a", "b"]
        assert file.get("absent", int) is None
        assert file.get("absent", int, 5) == 5
        with pytest.raises(GGUFError, match="'absent' is missing"):
            file.require("absent", str)
        with pytest.raises(GGUFError, match=r"'llama\.block_count' is of type integer, expected bool"):
            file.require("llama.block_count", bool)
        with pytest.raises(GGUFError, match=r"'llama\.rope\.freq_base' is of type float, expected integer"):
            file.get("llama.rope.freq_base", int, 1)
        with pytest.raises(GGUFError, match="'names' is of type array of strings, expected numeric array"):
            file.require("names", np.ndarray)
        with pytest.raises(TypeError):
            file.metadata["new"] = 1  # type: ignore[index]
        with pytest.raises(AttributeError):
            file.version = 1  # type: ignore[misc]


@pytest.mark.parametrize("size", [0, 1000])
def test_a_file_that_shrinks_is_an_error(sample: tuple[Path, object], size: int) -> None:
    path = sample[0]
    with GGUFFile.open(path) as file:
        os.truncate(path, size)
        for use in (lambda: file.raw("F32"), lambda: file.dequantize("F32"), file.fingerprint):
            with pytest.raises(GGUFError, match=r"sample\.gguf was changed after it was opened"):
                use()


def test_a_file_that_is_overwritten_is_an_error(sample: tuple[Path, object]) -> None:
    path = sample[0]
    with GGUFFile.open(path) as file:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        with path.open("r+b") as target:
            target.write(data)
        os.utime(path, ns=(1, 1))
        with pytest.raises(GGUFError, match="was changed"):
            file.raw("F32")


def test_a_file_that_is_replaced_stays_what_it_was(sample: tuple[Path, object]) -> None:
    path = sample[0]
    with GGUFFile.open(path) as file:
        before = file.raw("Q8_0").tobytes()
        other = path.with_name("other")
        other.write_bytes(b"something else")
        other.replace(path)
        assert file.raw("Q8_0").tobytes() == before


def test_close(sample: tuple[Path, object]) -> None:
    file = GGUFFile.open(sample[0])
    blocks = file.raw("Q8_0")
    copy = blocks.tobytes()
    file.close()
    file.close()
    assert blocks.tobytes() == copy
    with pytest.raises(GGUFError, match=r"sample\.gguf is closed"):
        file.raw("Q8_0")


def write_parts(folder: Path, parts: int = 3) -> list[Path]:
    """A model in several files, named as `gguf-split` names them."""
    writer = gguf.GGUFWriter(folder / "big.gguf", "llama", split_max_tensors=2)
    writer.add_block_count(3)
    for index in range(2 * parts - 1):
        writer.add_tensor(f"t{index}", np.full((2, 32), index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("big-*.gguf"))


def test_parts_of_a_model_are_one_file(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    assert [path.name for path in paths] == [f"big-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    whole = b"".join(path.read_bytes() for path in paths)
    for path in paths:
        with GGUFFile.open(path) as file:
            assert (file.path, file.name, file.size) == (paths[0], "big", len(whole))
            assert file.require("llama.block_count", int) == 3
            assert list(file.tensors) == [f"t{index}" for index in range(5)]
            for index in range(5):
                np.testing.assert_array_equal(file.dequantize(f"t{index}"), np.full((2, 32), index, np.float32))
            assert file.fingerprint() == hashlib.sha256(whole).hexdigest()
            os.utime(paths[1], ns=(1, 1))
            with pytest.raises(GGUFError, match=r"big-00002-of-00003\.gguf was changed"):
                file.dequantize("t2")
        os.utime(paths[1])


def test_parts_that_lack_are_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[2].unlink()
    with pytest.raises(GGUFError, match=r"'big-00001-of-00003\.gguf' .* lack 'big-00003-of-00003\.gguf'$"):
        GGUFFile.open(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(GGUFError, match=r"'big-00003-of-00003\.gguf' says it is part 2 of 3"):
        GGUFFile.open(paths[1])
    other = paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match=r"'model\.gguf' is one of 3 parts .* '-00001-of-00003\.gguf'"):
        GGUFFile.open(other)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"x" * 100])
def test_no_gguf_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFError):
        GGUFFile.open(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        GGUFFile.open(path)


@pytest.mark.model
def test_opens_a_large_vocabulary_fast(gemma_path: Path) -> None:
    start = time.process_time()
    with GGUFFile.open(gemma_path) as file:
        assert len(file.require("tokenizer.ggml.tokens", list)) == 262144
    assert time.process_time() - start < 2


@pytest.mark.model
def test_reads_what_the_gguf_package_reads(smollm_path: Path) -> None:
    reader = gguf.GGUFReader(smollm_path)
    with GGUFFile.open(smollm_path) as file:
        assert [(t.name, tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in reader.tensors] == [
            (t.name, t.shape, t.offset, t.nbytes) for t in file.tensors.values()
        ]
        for name, field in reader.fields.items():
            if not name.startswith("GGUF."):
                value = file.metadata[name]
                assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
