"""What hatchling does beside copying files: the server goes into a wheel under a name of its own."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ServerHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds `atlas_jax_server`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Writes the package where hatchling takes it from."""
        root = Path(self.root)
        tools = runpy.run_path(str(root / "tools" / "wheel_server.py"))
        made = Path(self.directory) / ".wheel" / tools["PACKAGE"]
        shutil.rmtree(made, ignore_errors=True)
        if version == "editable":
            tools["alias"](made)
            build_data["force_include_editable"][str(made)] = tools["PACKAGE"]
        else:
            tools["copy"](root, made)
            build_data["force_include"][str(made)] = tools["PACKAGE"]

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Takes it away again."""
        shutil.rmtree(Path(self.directory) / ".wheel", ignore_errors=True)
