"""Counts XLA compilations. After warm-up there must be none: a shape nobody foresaw costs seconds in mid-stream."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Compilations of this process since the counter was made, persistent-cache hits included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self._count += 1
                self._seconds += duration_secs

    @property
    def count(self) -> int:
        """How many programs were compiled or loaded."""
        with self._lock:
            return self._count

    @property
    def seconds(self) -> float:
        """Time that took."""
        with self._lock:
            return self._seconds


def use_cache(folder: Path) -> None:
    """Keeps compiled programs in a folder across starts; it must be as trusted as the code.

    In a folder that cannot be written, those that are there are used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return
    if not os.access(folder, os.W_OK):  # said once by `cache_folder.usable`, not once a program
        warnings.filterwarnings("ignore", message="Error writing persistent compilation cache entry")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
