"""Checkpoints of training runs, kept by orbax; a run's configuration lies beside them."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from atlas_jax.model.lm.config import LMConfig
from atlas_jax.optim import TrainState

_CONFIG = "model.json"


class CheckpointError(ValueError):
    """A directory that holds a run of another model."""


class Checkpoints:
    """The newest checkpoints of one run.

    Raises:
      CheckpointError: the directory holds a run of another model.
    """

    def __init__(self, directory: str | os.PathLike[str], config: LMConfig, *, keep: int = 2) -> None:
        root = Path(directory).absolute()
        root.mkdir(parents=True, exist_ok=True)
        described = root / _CONFIG
        if not described.exists():
            described.write_text(config.to_json())
        elif LMConfig.from_json(described.read_text()) != config:
            raise CheckpointError(f"{described.name} in {root.name} describes another model than the one to be trained")
        self._manager = ocp.CheckpointManager(
            root, options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        )

    def save(self, state: TrainState, step: int) -> None:
        """Writes a checkpoint; it counts only once it is complete."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def latest(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint, placed on devices as `like` is; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        assert isinstance(restored, TrainState)
        return restored

    def close(self) -> None:
        """Lets go of the directory."""
        self._manager.close()
