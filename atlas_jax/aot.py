"""AOT-compiled programs by name of their shape. What is compiled when is decided here, not by whoever calls first.

A plain `jax.jit` compiles inside the first call that brings a new shape, seconds of silence for every stream. An `AotProgram`
is compiled ahead for the keys it will be called with, from shapes alone, on any thread; calling it never traces again.

A computation of several programs is written once, as a function of how it calls them (`Mode`): `RUN` runs them, `COMPILE`
takes and returns shapes and compiles them, `INLINE` makes them parts of the program that is being traced.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax

from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.sharding import ONE_DEVICE, MeshLayout


class AotProgram:
    """A function with one executable per key; the key names all that decides the shapes of its arguments.

    On a mesh, arguments that are not placed yet and all results have a leading axis of rows (`MeshLayout.rows`).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        donate: tuple[int, ...] = (),
        mesh_layout: MeshLayout = ONE_DEVICE,
        kernels: KernelChoice | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          kernels: that it may use; None takes the choice of whoever compiles it.
        """
        self._function = function
        self._mesh_layout = mesh_layout
        self._kernels = kernels
        # an argument may be there for its memory alone
        self._jitted = jax.jit(mesh_layout.program(function), donate_argnums=donate, keep_unused=True)
        self._ready: dict[Hashable, jax.stages.Compiled] = {}
        self._locks: dict[Hashable, threading.Lock] = {}

    def __call__(self, key: Hashable, *args: Any) -> Any:
        """Runs it; compiles first if nobody has."""
        compiled = self._ready.get(key)
        if compiled is None:
            compiled = self.executable(key, *args)
        return compiled(*args)

    def ready(self, key: Hashable) -> bool:
        """Whether it is compiled for a key."""
        return key in self._ready

    def compile(self, key: Hashable, *args: Any) -> Any:
        """Compiles it for a key; `args` may be shapes instead of arrays. Returns the shapes of its results."""
        return shapes(self.executable(key, *args).out_info)

    def inline(self, key: Hashable, *args: Any) -> Any:
        """Its function, as a part of the program that is being traced."""
        return self._function(*args)

    def executable(self, key: Hashable, *args: Any) -> jax.stages.Compiled:
        """What runs for a key, compiled if nobody has; `args` as for `compile`."""
        with self._locks.setdefault(key, threading.Lock()):  # dict.setdefault is atomic
            if key not in self._ready:
                kernels = contextlib.nullcontext() if self._kernels is None else self._kernels.scope()
                with self._mesh_layout.scope(), kernels:
                    self._ready[key] = self._jitted.lower(*self._mesh_layout.rows(args)).compile()
            return self._ready[key]


Mode = Callable[..., Any]
"""How a computation of several programs calls each: with the program, its key and its arguments."""
RUN: Mode = AotProgram.__call__
COMPILE: Mode = AotProgram.compile
INLINE: Mode = AotProgram.inline


def shape(of: tuple[int, ...], dtype: Any) -> Any:
    """What stands for an array while a program is compiled."""
    return jax.ShapeDtypeStruct(of, dtype)


def shapes(tree: Any) -> Any:
    """The shapes and types of a tree's arrays."""
    return jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), tree)
