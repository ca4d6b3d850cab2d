"""Checkpoints of training runs, kept by orbax; what the run is lies beside them, and another is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from atlas_jax.optim import TrainState

_MODEL, _RUN = "model.json", "run.json"


class CheckpointError(ValueError):
    """A directory that holds another run; the message names what differs."""


class Checkpoints:
    """The newest checkpoints of one run.

    Args:
      model, run: what it is, as JSON objects.

    Raises:
      CheckpointError: the directory holds a run of another model, or with other settings.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: Mapping[str, Any],
        run: Mapping[str, Any],
        *,
        keep: int = 2,
    ) -> None:
        root = Path(directory).absolute()
        root.mkdir(parents=True, exist_ok=True)
        for name, what, wanted in ((_MODEL, "another model", model), (_RUN, "other settings", run)):
            wanted = json.loads(json.dumps(wanted))  # as it is read back: tuples are lists
            described = root / name
            if not described.exists():
                described.write_text(json.dumps(wanted, indent=2, sort_keys=True))
                continue
            different = list(_differences("", json.loads(described.read_text()), wanted))
            if different:
                raise CheckpointError(f"{root.name} holds a run of {what}: {'; '.join(different[:4])}")
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


def _differences(place: str, held: Any, wanted: Any) -> list[str]:
    if isinstance(held, dict) and isinstance(wanted, dict):
        names = sorted(held.keys() | wanted.keys())
        return [d for n in names for d in _differences(f"{place}.{n}".lstrip("."), held.get(n), wanted.get(n))]
    return [] if held == wanted else [f"{place} is {held!r} there and {wanted!r} here"]
