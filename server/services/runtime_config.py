"""The part of the configuration that can change while the server runs."""

from __future__ import annotations

from typing import Any

import msgspec

from server.config.settings import Settings
from server.schemas.atlas import AtlasDefaults, ConfigChange, RuntimeValues
from server.services.memory_options import check_memory_dim, check_windows

_NULL_MEANS_CALIBRATED = ("learning_rate", "use_muon")


class RuntimeConfig:
    """Holds one immutable set of values; a change replaces the whole set or nothing."""

    def __init__(self, settings: Settings) -> None:
        atlas = settings.atlas
        self.max_window = atlas.max_window
        self.values = RuntimeValues(
            **_fields(atlas.default_config),
            memory_save_interval=atlas.memory_save_interval,
            metrics_interval=atlas.metrics_interval,
            stats_update_interval=atlas.stats_update_interval,
            latency_budget_ms=atlas.latency_budget_ms,
            log_atlas_operations=atlas.log_atlas_operations,
        )

    def shown(self, memory_dim: int | None) -> RuntimeValues:
        """The values as they are shown, with the dimension of the memory that is served."""
        return msgspec.structs.replace(self.values, memory_dim=memory_dim)

    def change(self, wanted: ConfigChange, memory_dim: int | None) -> None:
        """Applies a change; raises BadRequest, and then nothing has changed.

        Args:
          memory_dim: of the memory that is served, the only one that may be named.
        """
        check_memory_dim(wanted.memory_dim, served=memory_dim, prefix="")
        changes = {
            name: value
            for name, value in _fields(wanted).items()
            if name != "memory_dim"
            and value is not msgspec.UNSET
            and (value is not None or name in _NULL_MEANS_CALIBRATED)
        }
        values = msgspec.structs.replace(self.values, **changes)
        check_windows(values, max_window=self.max_window, prefix="")
        self.values = values


def _fields(struct: AtlasDefaults | ConfigChange) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}
