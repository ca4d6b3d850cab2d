"""`GET /v1/models`."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class ModelMeta(Struct, kw_only=True, frozen=True):
    """Facts about the weights."""

    architecture: str
    n_params: int
    size: int
    n_ctx_train: int
    n_vocab: int
    n_embd: int
    n_layer: int


class Model(Struct, kw_only=True, frozen=True):
    """One model a request can name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    meta: ModelMeta
    owned_by: str = "atlas-jax"


class ModelList(Struct, kw_only=True, frozen=True):
    """Every model of this server."""

    object: Literal["list"] = "list"
    data: list[Model]
