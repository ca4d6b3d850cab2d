"""Compiled functions by name of their shape. What is compiled when is decided here, not by whoever calls first.

A plain `jax.jit` compiles inside the first call that brings a new shape, seconds of silence for every stream. A `AotProgram`
is compiled ahead for the keys it will be called with, from shapes alone, on any thread; calling it never traces again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax

from atlas_jax.sharding import ONE_DEVICE, MeshLayout


class AotProgram:
    """A function with one executable per key; the key names all that decides the shapes of its arguments.

    On a mesh, arguments that are not placed yet and all results have a leading axis of rows (`MeshLayout.rows`).
    """

    def __init__(
        self, function: Callable[..., Any], *, donate: tuple[int, ...] = (), mesh_layout: MeshLayout = ONE_DEVICE
    ) -> None:
        self._placement = mesh_layout
        # an argument may be there for its memory alone
        self._jitted = jax.jit(mesh_layout.program(function), donate_argnums=donate, keep_unused=True)
        self._ready: dict[Hashable, Callable[..., Any]] = {}
        self._locks: dict[Hashable, threading.Lock] = {}

    def __call__(self, key: Hashable, *args: Any) -> Any:
        """Runs it; compiles first if nobody has."""
        compiled = self._ready.get(key)
        if compiled is None:
            compiled = self.compile(key, *args)
        return compiled(*args)

    def ready(self, key: Hashable) -> bool:
        """Whether it is compiled for a key."""
        return key in self._ready

    def compile(self, key: Hashable, *args: Any) -> Callable[..., Any]:
        """The executable for a key; `args` may be shapes instead of arrays."""
        with self._locks.setdefault(key, threading.Lock()):  # dict.setdefault is atomic
            if key not in self._ready:
                with self._placement.scope():
                    self._ready[key] = self._jitted.lower(*self._placement.rows(args)).compile()
            return self._ready[key]


def shape(of: tuple[int, ...], dtype: Any) -> Any:
    """What stands for an array while a program is compiled."""
    return jax.ShapeDtypeStruct(of, dtype)


def shapes(tree: Any) -> Any:
    """The shapes and types of a tree's arrays."""
    return jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), tree)
