"""The part of the configuration that can change while the server runs."""

from __future__ import annotations

import msgspec

from atlas_jax.engine.api import EngineProtocol
from server.config.settings import Settings, SettingsError
from server.errors import BadRequest
from server.schemas.runtime_config import ConfigChange, RuntimeValues, runtime_values, values_of
from server.services.memory_options import check_memory_dim, check_windows, check_with_engine


class RuntimeConfig:
    """Holds one immutable set of values; a change replaces the whole set or nothing."""

    def __init__(self, settings: Settings) -> None:
        self.max_window = settings.atlas.max_window
        self._has_memory = settings.atlas.enabled
        self.values = runtime_values(settings.atlas)

    def shown(self, memory_dim: int | None) -> RuntimeValues:
        """The values as they are shown, with the dimension of the memory that is served."""
        return msgspec.structs.replace(self.values, memory_dim=memory_dim)

    def check(self, engine: EngineProtocol) -> None:
        """Raises SettingsError for defaults that this engine would refuse."""
        if not self._has_memory:
            return
        try:
            check_with_engine(self.values, engine, prefix="atlas.default_config.")
        except BadRequest as error:
            raise SettingsError(str(error)) from None

    def change(self, wanted: ConfigChange, engine: EngineProtocol) -> None:
        """Applies a change; raises BadRequest, and then nothing has changed.

        Args:
          engine: the engine that is to run requests with these values; its memory has the only dimension that may be named.
        """
        check_memory_dim(wanted.memory_dim, served=engine.model.memory_dim, prefix="")
        unsaid = {field.name: field.default for field in msgspec.structs.fields(ConfigChange)}
        changes = {name: value for name, value in values_of(wanted).items() if value is not unsaid[name]}
        values = msgspec.structs.replace(self.values, **changes)
        check_windows(values, max_window=self.max_window, prefix="")
        check_with_engine(values, engine, prefix="")
        self.values = values
