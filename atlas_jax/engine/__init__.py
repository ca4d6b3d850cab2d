"""The serving engine: continuous batching over one compiled step, with sessions that keep their memory.

`Engine` is imported when it is first used: its interface (`engine.api`) and its settings (`engine.config`) need no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atlas_jax.engine.config import EngineConfig

if TYPE_CHECKING:
    from atlas_jax.engine.engine import Engine

__all__ = ["Engine", "EngineConfig"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from atlas_jax.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'atlas_jax.engine' has no attribute {name!r}")
