"""Giving memory back to the system."""

from __future__ import annotations

import ctypes

import pytest

from atlas_jax.engine.resident import give_back, resident_bytes

BLOB = 64 << 10


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc")
def test_much_freed_memory_goes_back_to_the_system() -> None:
    blobs = [b"x" * BLOB for _ in range(6400)]
    pins = blobs[::400]  # the C library gives back what is free at the end of its heap, and no more
    held = resident_bytes()
    del blobs
    give_back()
    assert held - resident_bytes() > 300 << 20
    assert all(pin[-1:] == b"x" for pin in pins)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc")
def test_a_little_freed_memory_stays() -> None:
    give_back()
    blobs = [b"x" * BLOB for _ in range(800)]
    pins = blobs[::100]
    held = resident_bytes()
    del blobs
    give_back()
    assert held - resident_bytes() < 10 << 20
    assert len(pins) == 8
