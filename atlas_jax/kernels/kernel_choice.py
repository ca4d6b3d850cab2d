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
      gpu: those in Triton (`kernels.gpu`), which no GPU has run yet.
      interpret_tpu, interpret_gpu: run those kernels interpreted, on any platform: for tests.
    """

    cpu: bool = True
    tpu: bool = True
    gpu: bool = False
    interpret_tpu: bool = False
    interpret_gpu: bool = False

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """In which this is what programs are traced with, on this thread."""
        return _chosen(self)


DEFAULT_KERNELS = KernelChoice()

# known to jit: what was traced with one choice is not taken for another
_chosen = jax.make_user_context(DEFAULT_KERNELS)


def chosen() -> KernelChoice:
    """What programs are traced with: `DEFAULT_KERNELS` unless a `KernelChoice.scope` says otherwise."""
    choice: KernelChoice = _chosen.value
    return choice
