"""Giving memory back to the system."""

from __future__ import annotations

import ctypes

import pytest

from atlas_jax.engine.host_memory import give_back, resident_bytes

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
BLOB = 64 << 10


def freed(count: int) -> tuple[list[bytes], int]:
    """What little is left of so many blobs, and what the process held with all of them."""
    blobs = [b"x" * BLOB for _ in range(count)]
    held = resident_bytes()
    return blobs[::100], held  # the C library gives back by itself what is free at the end of its heap, and no more


def test_much_freed_memory_goes_back_to_the_system() -> None:
    before = give_back(0)
    left, held = freed(6400)
    after = give_back(before)
    assert held - after > 300 << 20
    assert abs(after - resident_bytes()) < 10 << 20
    assert len(left) == 64


def test_a_little_freed_memory_stays() -> None:
    before = give_back(0)
    left, held = freed(800)
    assert give_back(before) == before
    assert held - resident_bytes() < 10 << 20
    assert len(left) == 8
