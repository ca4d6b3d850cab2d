"""The part of the configuration that can change while the server runs."""

from __future__ import annotations

import msgspec

from server.config.settings import Settings
from server.schemas.runtime_config import ConfigChange, RuntimeValues, runtime_values, values_of
from server.services.memory_options import check_memory_dim, check_windows


class RuntimeConfig:
    """Holds one immutable set of values; a change replaces the whole set or nothing."""

    def __init__(self, settings: Settings) -> None:
        self.max_window = settings.atlas.max_window
        self.values = runtime_values(settings.atlas)

    def shown(self, memory_dim: int | None) -> RuntimeValues:
        """The values as they are shown, with the dimension of the memory that is served."""
        return msgspec.structs.replace(self.values, memory_dim=memory_dim)

    def change(self, wanted: ConfigChange, memory_dim: int | None) -> None:
        """Applies a change; raises BadRequest, and then nothing has changed.

        Args:
          memory_dim: of the memory that is served, the only one that may be named.
        """
        check_memory_dim(wanted.memory_dim, served=memory_dim, prefix="")
        unsaid = {field.name: field.default for field in msgspec.structs.fields(ConfigChange)}
        changes = {name: value for name, value in values_of(wanted).items() if value is not unsaid[name]}
        values = msgspec.structs.replace(self.values, **changes)
        check_windows(values, max_window=self.max_window, prefix="")
        self.values = values
