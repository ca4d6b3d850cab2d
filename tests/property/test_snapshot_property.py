"""Session files: what is saved is what is loaded, and no bytes whatever do more than be refused."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE, LayerConfig, MemoryConfig, ModelConfig, RopeConfig
from atlas_jax.engine.api import SessionKey, SnapshotInvalid, StorageFull
from atlas_jax.engine.runner.decode_state import Sequences, init_sequences
from atlas_jax.engine.sessions import archive, files, snapshot
from atlas_jax.engine.sessions.codec import decode_session, encode_session
from atlas_jax.engine.sessions.history import History
from atlas_jax.engine.sessions.host_arrays import held_bytes
from atlas_jax.engine.sessions.journal import Reading
from atlas_jax.engine.sessions.recall_layout import RecallLayout
from atlas_jax.engine.sessions.session import Checkpoint, Session, SessionShape, SessionStats, Unread
from atlas_jax.engine.sessions.snapshot import Listing
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kv_cache import first_pages
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.transformer import SINKS

MODEL = ModelConfig(
    family="llama",
    vocab=50,
    embed=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ff=8,
    layers=(LayerConfig(), LayerConfig()),
    ropes=(RopeConfig(base=10_000.0, dims=4),),
    context_length=4096,
    norm_eps=1e-5,
)
MEMORY = MemoryConfig(
    layers=(1,),
    components=4,
    features=16,
    code_dim=8,
    max_window=256,
    max_omega_window=256,
    max_kept=2 * PAGE,
    kept_weights=(3.0, 1.0),
)
DIVISION = KeptDivision.of(MODEL, MEMORY.kept_weights)
_PREFIX = 48  # magic, version, length and digest of the head


def layout(dtype: KVDtype = "int8") -> RecallLayout:
    return RecallLayout(MODEL, MEMORY, dtype, "fingerprint", "adapter")


def filled(row: Sequences, random: np.random.Generator) -> Sequences:
    """A row of plausible numbers in place of zeros."""

    def fill(leaf: Any) -> np.ndarray:
        if leaf.dtype == np.int8:
            return random.integers(0, 2, leaf.shape, np.int8)
        if leaf.dtype in (np.float32, np.float16):
            return random.standard_normal(leaf.shape).astype(leaf.dtype)
        return np.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, row)


def with_pairs(row: Sequences, counts: list[int]) -> Sequences:
    """The row with zeros where no pair is kept, and no scores before one is: what is there is no part of a state."""
    filled = np.zeros(sum(row.cache.kept_pages), bool)
    for kv, first, count in zip(row.cache.kv, first_pages(row.cache.kept_pages), counts, strict=True):
        filled[first : first - (-count // PAGE)] = True
        assert kv.choice is not None
        if not count:
            kv.choice.ring_score[:] = 0  # type: ignore[index]
    for leaf in jax.tree.leaves(row.cache.pairs):
        leaf[:, ~filled] = 0
    return row


def make_session(length: int, plan: PageSchedule, kept: int, dtype: KVDtype, seed: int) -> Session:
    """A session that has read `length` tokens, as the engine leaves it."""
    random = np.random.default_rng(seed)
    text = random.integers(0, MODEL.vocab, length).tolist()
    history = History()
    history.extend(text)
    if length > 3:
        history.first_reply = 3
    page = (length - 1) // PAGE if length else -1
    shapes = jax.eval_shape(lambda: init_sequences(MODEL, MEMORY, 1, max(plan.ring((page + 1) * PAGE), 4), dtype))
    row = filled(shapes, random)
    slots = np.full(row.cache.page.shape, -1, np.int32)
    for number in range(page + 1):
        slots[0, plan.slot(number)] = number
    left = plan.left(max(page, 0))
    capacities = DIVISION.capacities(kept)
    pairs = [min(max(left * PAGE - SINKS, 0), most) for most in capacities]
    for name, value in (
        ("page", slots),
        ("kept", np.asarray([pairs], np.int32)),
        ("slot", np.asarray([plan.slot(max(page, 0))], np.int32)),
        ("first_page", np.asarray([plan.left(max(page, 0))], np.int32)),
        ("position", np.asarray([length], np.int32)),
    ):
        object.__setattr__(row.cache, name, value)
    row = with_pairs(row, pairs)
    assert row.memory is not None
    recent = np.arange(length)[-MEMORY.ring :]
    row.memory.tokens[0, recent % MEMORY.ring] = np.asarray(text, np.int32)[recent]  # type: ignore[index]
    return Session(
        key=SessionKey("owner", "a session"),
        shape=SessionShape(plan, layers=1, degree=2, kept=kept, capacities=capacities),
        history=history,
        checkpoints=[Checkpoint(length, page, row, plan.left(max(page, 0)) * PAGE)] if length else [],
        stats=SessionStats(updates=3, muon_iterations=4, omega_loss=0.25, last_update=123.5),
        pending=7 if length else None,
        state=b'{"any":["thing",1,null]}',
        created=1.5,
        last_used=2.5,
        generation=12,
    )


sessions = st.builds(
    make_session,
    st.integers(0, 5 * PAGE) | st.sampled_from([PAGE, 2 * PAGE, 3 * PAGE]),
    st.sampled_from([PageSchedule(1, 1), PageSchedule(2, 1), PageSchedule(1, 2), PageSchedule(2, 2)]),
    st.sampled_from([0, 100, PAGE, 2 * PAGE]),
    st.sampled_from(["int8", "float32"]),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sessions, st.booleans())
def test_a_state_at_rest_is_what_it_was_and_counts_what_it_takes(session: Session, diverged: bool) -> None:
    """Also where pairs were kept of a text none of whose writes was taken."""
    where, shape = layout(kind_of(session)), session.shape
    for checkpoint in session.checkpoints:
        before = replace(checkpoint, absorbed=0) if diverged else checkpoint
        after = where.rest(shape, before)
        arrays, wanted = (where.arrays(shape, one) for one in (after, before))
        for name in wanted:
            if before.absorbed or name not in ("weights", "momentum"):
                np.testing.assert_array_equal(arrays[name], wanted[name], err_msg=name)
        written = sum(array.nbytes for array in arrays.values())
        assert written <= after.bytes, (
            "what a snapshot will take of an owner's share is never more than is counted before"
        )
        assert written <= where.largest_snapshot - (16 << 20)
        if not checkpoint.kept(shape):
            kv = after.row.cache.kv[0]
            assert kv.choice is not None
            held = [leaf.nbytes for leaf in jax.tree.leaves(kv.choice)]
            takes = held_bytes(Sequences(replace(after.row.cache, kv=(kv,) * 2), None))
            none = replace(after.row.cache, kv=(replace(kv, choice=None),) * 2, pairs=None)
            empty = held_bytes(Sequences(none, None))
            assert takes - empty == (2 * sum(held[-2:]) if shape.kept else 0), "the latest queries and nothing else"


def kind_of(session: Session) -> KVDtype:
    if not session.checkpoints:
        return "int8"
    return "float32" if isinstance(session.checkpoints[0].row.cache.kv[0].k, np.ndarray) else "int8"


def sealed(payload: bytes, version: int = snapshot.VERSION, **changes: Any) -> bytes:
    """A payload under right checksums: damage that only the contents can show."""
    head = msgspec.json.encode(
        msgspec.structs.replace(
            HEAD, payload_bytes=len(payload), payload_sha256=hashlib.sha256(payload).hexdigest(), **changes
        )
    )
    return struct.pack("<8sII32s", snapshot.MAGIC, version, len(head), hashlib.sha256(head).digest()) + head + payload


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sessions)
def test_loading_what_was_saved_gives_the_session_back(session: Session) -> None:
    where = layout(kind_of(session))
    data = encode_session(where, session)
    assert len(data) <= where.largest_snapshot
    loaded = decode_session(where, data)
    for name in (
        "key",
        "shape",
        "history",
        "stats",
        "pending",
        "state",
        "created",
        "last_used",
        "generation",
        "unread",
    ):
        assert getattr(loaded, name) == getattr(session, name)
    assert len(loaded.checkpoints) == len(session.checkpoints)
    for old, new in zip(session.checkpoints, loaded.checkpoints, strict=True):
        assert (new.position, new.page, new.absorbed) == (old.position, old.page, old.absorbed)
        ring = session.shape.plan.ring((old.page + 1) * PAGE)
        for one, other in zip(old.row.cache.kv, new.row.cache.kv, strict=True):
            for part in ("k", "v"):
                leaves = zip(jax.tree.leaves(getattr(one, part)), jax.tree.leaves(getattr(other, part)), strict=True)
                assert all(np.array_equal(a[:, :ring], b) for a, b in leaves)
            assert np.array_equal(one.sink_k, other.sink_k)
            assert np.array_equal(one.sink_v, other.sink_v)
            if session.shape.kept:
                for before, after in zip(jax.tree.leaves(one.choice), jax.tree.leaves(other.choice), strict=True):
                    assert np.array_equal(before[:, : after.shape[1]], after)
        if session.shape.kept:
            for before, after in zip(*(jax.tree.leaves(c.row.cache.pairs) for c in (old, new)), strict=True):
                assert np.array_equal(before, after)
        assert np.array_equal(old.row.cache.kept, new.row.cache.kept)
        for name in ("weights", "momentum", "momentum_end", "scale", "seen", "loss"):
            assert np.array_equal(getattr(old.row.memory, name), getattr(new.row.memory, name)), name
        for name in ("slot", "first_page", "position"):
            assert np.array_equal(getattr(old.row.cache, name), getattr(new.row.cache, name)), name
    again = snapshot.read_head(encode_session(where, loaded))[0]
    assert again.payload_sha256 == snapshot.read_head(data)[0].payload_sha256, "saving again gives the same bytes"


EXAMPLE = replace(
    make_session(3 * PAGE + 5, PageSchedule(1, 1), PAGE, "int8", 0),
    unread=(Unread([1, 2, 3], Reading(1, 1, 1, 2, 0, 0, "exact", 256, 1.0, 0.9), ((3 * PAGE + 6, 3 * PAGE + 8),)),),
)
DATA = encode_session(layout(), EXAMPLE)
HEAD, _START = snapshot.read_head(DATA)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sessions, st.booleans())
def test_a_state_at_rest_has_its_kept_pairs_and_no_room_for_none(session: Session, written: bool) -> None:
    """Whether or not the memory's writes of what has left were taken."""
    where = layout(kind_of(session))
    for checkpoint in session.checkpoints:
        at_rest = where.rest(session.shape, checkpoint if written else replace(checkpoint, absorbed=0)).row
        pairs = int(checkpoint.row.cache.kept.sum())

        def of(row: Sequences) -> list[Any]:
            return jax.tree.leaves((row.cache.pairs, [kv.choice and kv.choice.ring_score for kv in row.cache.kv]))

        for before, after in zip(of(checkpoint.row), of(at_rest), strict=True):
            assert np.array_equal(after, before) if pairs else not after.any()
        roomless = held_bytes(replace(at_rest, memory=None))
        assert pairs or roomless < held_bytes(replace(checkpoint.row, memory=None))


def test_a_listing_is_read_from_the_first_bytes_alone() -> None:
    head, start = snapshot.read_head(DATA[: snapshot.HEAD_BYTES])
    assert start == _START
    listing = head.listing
    assert (listing.owner, listing.session_id, listing.generation) == ("owner", "a session", 12)
    assert (listing.tokens, listing.created, listing.last_used) == (3 * PAGE + 8, 1.5, 2.5)


def test_a_memory_that_was_never_written_takes_no_room() -> None:
    session = make_session(PAGE, PageSchedule(2, 1), PAGE, "int8", 1)
    memory = session.checkpoints[0].row.memory
    assert memory is not None
    for name in ("weights", "momentum", "scale"):
        object.__setattr__(memory, name, np.zeros_like(getattr(memory, name)))
    matrices = MEMORY.code_dim * (MEMORY.features + 2 * MEMORY.max_omega_window)
    small, full = (
        encode_session(layout(), session),
        encode_session(layout(), make_session(PAGE, PageSchedule(2, 1), PAGE, "int8", 1)),
    )
    assert len(full) - len(small) >= matrices
    loaded = decode_session(layout(), small).checkpoints[0].row.memory
    assert loaded is not None
    for name in ("weights", "momentum", "scale"):
        assert np.array_equal(getattr(loaded, name), getattr(memory, name))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, change: int) -> None:
    damaged = bytearray(DATA)
    damaged[position] ^= change
    with pytest.raises(SnapshotInvalid):
        decode_session(layout(), bytes(damaged))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, len(DATA) - 1) | st.integers(0, 60))
def test_any_truncation_is_noticed(length: int) -> None:
    with pytest.raises(SnapshotInvalid):
        decode_session(layout(), DATA[:length])
    with pytest.raises(SnapshotInvalid):
        decode_session(layout(), DATA + DATA[:length] + b"x")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: struct.pack("<Q", len(tail)) + tail))
def test_hostile_payloads_under_a_right_checksum_are_refused(payload: bytes) -> None:
    for data in (payload, sealed(payload)):
        with pytest.raises(SnapshotInvalid):
            decode_session(layout(), data)


def parts() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    _, header, arrays = snapshot.decode(DATA)
    return header, arrays


def encoded(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    return snapshot.encode(HEAD.listing, HEAD.bound, header, arrays)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(0, 2), max_size=2),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(parts()[0])), values, st.booleans())
def test_a_header_is_a_session_or_is_refused(name: str, value: Any, remove: bool) -> None:
    header, arrays = parts()
    header[name] = value
    if remove:
        del header[name]
    try:
        data = encoded(header, arrays)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
        return  # nothing that JSON can say
    try:
        session = decode_session(layout(), data)
    except SnapshotInvalid:
        return
    encode_session(layout(), session)
    checkpoint = session.checkpoints[-1]
    assert checkpoint.position == session.history.length
    assert checkpoint.page in (checkpoint.position // PAGE, (checkpoint.position - 1) // PAGE)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(parts()[1])),
    st.sampled_from(["missing", "shape", "type", "nan", "inf", "huge", "negative", "large", "empty"]),
)
def test_an_array_is_what_the_engine_would_have_made_or_is_refused(name: str, change: str) -> None:
    header, arrays = parts()
    array = arrays[name].copy()
    number = array.dtype.kind == "f" or array.dtype == np.uint16  # the upper half of a float32
    if change == "missing" and name not in ("weights", "momentum", "scale"):
        del arrays[name]
    elif change == "shape":
        arrays[name] = np.concatenate([array, array]).astype(array.dtype)
    elif change == "empty":
        arrays[name] = array[:0]
    elif change == "type":
        arrays[name] = array.astype(np.float64)
    elif change in ("nan", "inf", "huge") and number:
        with np.errstate(over="ignore"):  # huge is infinite in 16 bits
            given = np.float32({"nan": np.nan, "inf": -np.inf, "huge": 1e30}[change])
            array.reshape(-1)[-1] = given.view(np.uint32) >> 16 if array.dtype == np.uint16 else given
        arrays[name] = array
    elif change in ("negative", "large") and array.dtype == np.int32 and array.size:
        array.reshape(-1)[0] = -5 if change == "negative" else 1 << 30
        arrays[name] = array
    else:
        return
    if name == "history.digests" and change == "empty":
        header["length"] = PAGE * 3 + 5
    with pytest.raises(SnapshotInvalid):
        decode_session(layout(), encoded(header, arrays))


def test_a_deeply_nested_header_is_refused() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    payload = safetensors.numpy.save({"a": np.zeros(1, np.float32)}, metadata={"atlas": f'{{"state": {deep}}}'})
    with pytest.raises(SnapshotInvalid):
        snapshot.decode(sealed(payload))


def test_another_model_version_memory_or_cache_is_named() -> None:
    for other, word in (
        (RecallLayout(MODEL, MEMORY, "int8", "other", "adapter"), "model"),
        (RecallLayout(MODEL, MEMORY, "float32", "fingerprint", "adapter"), "cache type"),
        (
            RecallLayout(
                MODEL,
                MemoryConfig(layers=(0,), components=4, features=16, code_dim=8),
                "int8",
                "fingerprint",
                "adapter",
            ),
            "mem",
        ),
    ):
        with pytest.raises(SnapshotInvalid, match=word):
            decode_session(other, DATA)
    with pytest.raises(SnapshotInvalid, match="version 9"):
        decode_session(layout(), sealed(DATA[_START:], version=9))
    with pytest.raises(SnapshotInvalid, match="not a session"):
        decode_session(layout(), b"PK\x03\x04" + DATA[4:])


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "session.atlas"
    with files.atomic_file(path) as file:
        file.write(b"old")
    return path


def fail_half_way(path: Path, error: Exception) -> None:
    with files.atomic_file(path) as file:
        file.write(b"new")
        raise error


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(kept: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(kept, RuntimeError("half way"))
    assert kept.read_bytes() == b"old"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_plainly_and_loses_nothing(kept: Path, number: int) -> None:
    with pytest.raises(StorageFull):
        fail_half_way(kept, OSError(number, os.strerror(number)))
    assert kept.read_bytes() == b"old"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_reader_sees_the_old_file_or_the_new_one(kept: Path) -> None:
    with files.atomic_file(kept) as file:
        file.write(b"new and long")
        file.flush()
        assert files.read_file(kept, 100) == b"old"
    assert files.read_file(kept, 100) == b"new and long"
    assert kept.stat().st_mode & 0o077 == 0, "nobody else may read it"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make",
    [lambda path: path.symlink_to("/etc/hostname"), lambda path: path.mkdir(), make_fifo],
    ids=["link", "folder", "fifo"],
)
def test_only_a_regular_file_is_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "session.atlas"
    make(path)
    with pytest.raises((SnapshotInvalid, IsADirectoryError)):
        files.read_file(path, 1000)


def test_a_file_larger_than_any_session_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "session.atlas"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SnapshotInvalid, match="exceeds"):
        files.read_file(path, 1000)
    with pytest.raises(FileNotFoundError):
        files.read_file(tmp_path / "none", 1000)


# --- exports ----------------------------------------------------------------------------------------------------------
def listing(name: str) -> Listing:
    return msgspec.structs.replace(HEAD.listing, session_id=name)


def write_export(path: Path, sessions: Iterable[tuple[Listing, bytes]]) -> tuple[int, int]:
    with files.atomic_file(path) as file:
        return archive.write(file, "model", sessions)


@contextlib.contextmanager
def read_export(path: Path) -> Iterator[archive.Reader]:
    with path.open("rb") as file, archive.opened(file) as reader:
        yield reader


names = st.text(min_size=1, max_size=20)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, st.binary(max_size=50), max_size=5))
def test_an_export_gives_back_every_session_by_any_name(tmp_path: Path, contents: dict[str, bytes]) -> None:
    path = tmp_path / "all.atlas"
    size, count = write_export(path, ((listing(name), data) for name, data in contents.items()))
    assert (size, count) == (path.stat().st_size, len(contents))
    with read_export(path) as reader:
        assert [one.session_id for one in reader.manifest.sessions] == list(contents)
        reader.check()
        for name, data in contents.items():
            assert reader.read(name, 1000) == data


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_export_is_refused_or_reads_as_it_was(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "all.atlas"
    contents = {"one": b"1" * 30, "two": b"2" * 30}
    write_export(path, ((listing(name), one) for name, one in contents.items()))
    with read_export(path) as reader:
        manifest = reader.manifest
    damaged = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged) - 1))]
    else:
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(damaged))
    for name, wanted in contents.items():
        try:
            with read_export(path) as reader:
                assert reader.manifest == manifest
                assert reader.read(name, 1000) == wanted
        except SnapshotInvalid:
            pass


def test_a_member_larger_than_any_session_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "all.atlas"
    write_export(path, [(listing("one"), bytes(10_000))])
    with read_export(path) as reader, pytest.raises(SnapshotInvalid, match="exceeds"):
        reader.read("one", 5000)


def test_an_export_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "all.atlas"
    write_export(path, [(listing("one"), b"old")])
    before = path.read_bytes()

    def broken() -> Iterator[tuple[Listing, bytes]]:
        yield listing("one"), b"new"
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(StorageFull):
        write_export(path, broken())
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
