"""`GET /`."""

from __future__ import annotations

from msgspec import Struct


class Root(Struct, kw_only=True, frozen=True):
    """What this server is; `model` and `memory` are null while it loads, and where keys are needed."""

    name: str
    version: str
    status: str
    model: str | None
    memory: bool | None
    endpoints: dict[str, str]
