"""Which of our own kernels programs may use: a value that is part of what is traced, so two engines can differ."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class KernelChoice:
    """Kernels that may replace XLA's form of an operation, where the platform and the shapes allow.

    Attributes:
      cpu: those in C (`kernels.cpu`).
      tpu: those in Mosaic (`kernels.tpu`).
      interpret_tpu: run the Mosaic kernels interpreted, on any platform: for tests.
    """

    cpu: bool = True
    tpu: bool = True
    interpret_tpu: bool = False

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """In which this is what programs are traced with, on this thread."""
        return _chosen(self)


ALL_KERNELS = KernelChoice()

# known to jit: what was traced with one choice is not taken for another
_chosen = jax.make_user_context(ALL_KERNELS)


def chosen() -> KernelChoice:
    """What programs are traced with: all kernels unless a `KernelChoice.scope` says otherwise."""
    choice: KernelChoice = _chosen.value
    return choice
