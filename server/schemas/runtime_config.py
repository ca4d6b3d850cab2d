"""The body and the answer of `/v1/atlas/config`, made from the settings that can change at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from server.config.settings import AtlasSection
from server.schemas.atlas import AtlasDefaults
from server.schemas.derive import changeable, fields_of, required, struct_of

CHANGEABLE = (
    "memory_save_interval",
    "metrics_interval",
    "stats_update_interval",
    "latency_budget_ms",
    "log_atlas_operations",
)
"""Settings of the `atlas` section that take effect while the server runs, beside all of its `default_config`."""

_SERVED = ("memory_dim",)
"""Decided when the server starts: shown, and refused where another value is wanted."""

if TYPE_CHECKING:

    class RuntimeValues(AtlasDefaults, kw_only=True, frozen=True):
        """As below, of which a type checker knows the fields that are read by name."""

        memory_save_interval: float
        metrics_interval: int
        stats_update_interval: int
        latency_budget_ms: float
        log_atlas_operations: bool
        memory_dim: int | None

    class ConfigChange(Struct):
        """As below."""

        memory_dim: int | None = None

else:
    RuntimeValues = struct_of(
        "RuntimeValues",
        [*fields_of(AtlasDefaults), *required(fields_of(AtlasSection, CHANGEABLE)), *fields_of(AtlasSection, _SERVED)],
        module=__name__,
        doc="Everything `/v1/atlas/config` shows and changes: the defaults of the `atlas` object, and the intervals.",
    )
    ConfigChange = struct_of(
        "ConfigChange",
        [
            *changeable([*fields_of(AtlasDefaults), *fields_of(AtlasSection, CHANGEABLE)]),
            *fields_of(AtlasSection, _SERVED),
        ],
        module=__name__,
        doc="""Body of `POST /v1/atlas/config`: the settings to change, all or none of them.

    null resets `learning_rate` and `use_muon` to the calibrated choice, `memory_budget` and `kept_pairs` to what fits
    the server's budget, and leaves every other field as it is.
    `memory_dim` is decided when the server starts: another than the one that is shown is refused.
    """,
    )


class ConfigResponse(Struct, kw_only=True, frozen=True):
    """Answer of `GET` and `POST /v1/atlas/config`."""

    status: str
    data: RuntimeValues


def runtime_values(atlas: AtlasSection) -> RuntimeValues:
    """What the configuration begins with."""
    return RuntimeValues(**values_of(atlas.default_config), **{name: getattr(atlas, name) for name in CHANGEABLE})


def values_of(struct: Struct) -> dict[str, Any]:
    """The fields of a struct by name."""
    return {name: getattr(struct, name) for name in struct.__struct_fields__}
