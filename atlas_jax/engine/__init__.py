"""The serving engine: continuous batching over one compiled step, with sessions that keep their memory."""

from atlas_jax.engine.engine import Engine, Limits

__all__ = ["Engine", "Limits"]
