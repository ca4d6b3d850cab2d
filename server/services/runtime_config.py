"""The part of the configuration that can change while the server runs."""

from __future__ import annotations

import msgspec

from server.config.settings import Settings
from server.schemas.runtime_config import ConfigChange, RuntimeValues, runtime_values, values_of
from server.services.memory_options import check_windows


class RuntimeConfig:
    """Holds one immutable set of values; a change replaces the whole set or nothing."""

    def __init__(self, settings: Settings) -> None:
        self.max_window = settings.atlas.max_window
        self.values = runtime_values(settings.atlas)

    def change(self, wanted: ConfigChange) -> RuntimeValues:
        """Applies a change; raises BadRequest, and then nothing has changed."""
        unsaid = {field.name: field.default for field in msgspec.structs.fields(ConfigChange)}
        changes = {name: value for name, value in values_of(wanted).items() if value is not unsaid[name]}
        values = msgspec.structs.replace(self.values, **changes)
        check_windows(values, max_window=self.max_window, prefix="")
        self.values = values
        return values
