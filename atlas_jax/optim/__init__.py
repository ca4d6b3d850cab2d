"""Muon for outer training and for inner steps, and data-parallel training steps that share its work."""

from __future__ import annotations

from atlas_jax.optim.axes import MatrixAxes
from atlas_jax.optim.muon import MuonState, muon, scale_by_muon, scale_by_shape
from atlas_jax.optim.parallel import Training, TrainState, local_training, pmap_training, sharded_training
from atlas_jax.optim.sharding import LOCAL, GradientSharding, average_gradients, mapped, sharded

__all__ = [
    "LOCAL",
    "GradientSharding",
    "MatrixAxes",
    "MuonState",
    "TrainState",
    "Training",
    "average_gradients",
    "local_training",
    "mapped",
    "muon",
    "pmap_training",
    "scale_by_muon",
    "scale_by_shape",
    "sharded",
    "sharded_training",
]
