"""atlas_jax: JAX-compiled transformers with ATLAS test-time memory (arXiv 2505.23735).

The memory rules are here by name, `atlas_jax.presets.atlas(64, 64)`, and imported when first used: jax is not loaded
for a program that only wants the version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atlas_jax import _platform as _platform  # sets XLA flags: must run before anything imports jax

if TYPE_CHECKING:
    from atlas_jax.memory import PRESETS as PRESETS
    from atlas_jax.memory import Diagnostics as Diagnostics
    from atlas_jax.memory import Features as Features
    from atlas_jax.memory import MemoryRule as MemoryRule
    from atlas_jax.memory import MemoryState as MemoryState
    from atlas_jax.memory import Params as Params
    from atlas_jax.memory import Tokens as Tokens
    from atlas_jax.memory import chunked as chunked
    from atlas_jax.memory import init_params as init_params
    from atlas_jax.memory import init_state as init_state
    from atlas_jax.memory import make_tokens as make_tokens
    from atlas_jax.memory import measure as measure
    from atlas_jax.memory import parts as parts
    from atlas_jax.memory import presets as presets
    from atlas_jax.memory import read as read
    from atlas_jax.memory import scan as scan
    from atlas_jax.memory import step as step

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Diagnostics",
    "Features",
    "MemoryRule",
    "MemoryState",
    "Params",
    "Tokens",
    "__version__",
    "chunked",
    "init_params",
    "init_state",
    "make_tokens",
    "measure",
    "parts",
    "presets",
    "read",
    "scan",
    "step",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'atlas_jax' has no attribute {name!r}")
    from atlas_jax import memory

    return getattr(memory, name)


def __dir__() -> list[str]:
    return __all__
