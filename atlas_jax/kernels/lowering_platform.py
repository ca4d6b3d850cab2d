"""Which platform programs are lowered for: this machine's own, unless they are to run elsewhere."""

from __future__ import annotations

import contextlib

import jax

# known to jit: what was traced for one platform is not taken for another
_elsewhere = jax.make_user_context("")


def elsewhere(platform: str) -> contextlib.AbstractContextManager[None]:
    """In which programs are traced for "cpu", "cuda" or "tpu", to be run by another process or machine."""
    return _elsewhere(platform)


def platform() -> str:
    """The platform programs are traced for."""
    return _elsewhere.value or jax.default_backend()


def is_here() -> bool:
    """Whether they run in this process, with what it has loaded."""
    return not _elsewhere.value
