"""`GET /v1/models`."""

from __future__ import annotations

from datetime import datetime
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


class AnthropicModel(Struct, kw_only=True, frozen=True):
    """The same model as Anthropic's clients know models."""

    id: str
    type: Literal["model"] = "model"
    display_name: str
    created_at: datetime
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int
    max_tokens: int


class AnthropicModels(Struct, kw_only=True, frozen=True):
    """Every model of this server, in one page."""

    data: list[AnthropicModel]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


class ModelList(Struct, kw_only=True, frozen=True):
    """Every model of this server."""

    object: Literal["list"] = "list"
    data: list[Model]
