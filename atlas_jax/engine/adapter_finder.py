"""Where an engine's recall memory comes from: the file a user gives, the one shipped or kept, or calibration now."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from atlas_jax.config import MemoryConfig, ModelConfig
from atlas_jax.engine import cache_folder
from atlas_jax.gguf import ModelFile, Tokenizer
from atlas_jax.model.params import ModelParams
from atlas_jax.progress import Progress, ProgressLog
from atlas_jax.recall import adapter_store
from atlas_jax.recall.adapter import Adapter
from atlas_jax.recall.adapter_store import AdapterError
from atlas_jax.recall.calibration import DEFAULT_DIM, candidates
from atlas_jax.recall.fit import calibrate_with, chat_template
from atlas_jax.sharding import MeshLayout

log = logging.getLogger("atlas.engine")

CALIBRATING = "[ATLAS] Calibrating"
"""Begins the lines about it in the log."""
FITTING = "The memory is still being fitted to this model"
"""What clients read until then."""
NOT_FITTED = "No memory could be fitted to this model"
"""What clients read of a calibration that failed; the log has the reason."""
_TOKENS = 4097
"""Tokens at most read of each text when a server calibrates by itself: 32 pages and what follows them."""


class FittingStopped(Exception):
    """Whoever asked for an adapter no longer wants it."""


@dataclass(frozen=True)
class Fitted:
    """An adapter that is valid for the model.

    Attributes:
      digest: of its file; snapshots are bound to it.
      source: "given", "shipped" or "calibrated".
    """

    config: MemoryConfig
    adapter: Adapter
    digest: str
    source: str


class AdapterFinder:
    """Finds or makes the adapter of a model; what is returned, and what is kept, has been checked.

    A gate that cannot be fitted turns the memory off even where the key maps are good. The gate says how far the
    memory's next-token distribution can be trusted, so any other one would either never open, and every write be for
    nothing, or spoil answers.
    """

    def __init__(
        self,
        file: ModelFile,
        config: ModelConfig,
        tokenizer: Tokenizer,
        params: ModelParams,
        *,
        max_window: int,
        memory_dim: int | None,
        mesh_layout: MeshLayout,
        seconds: float,
    ) -> None:
        """Looks for nothing yet.

        Args:
          memory_dim: of the memory; None takes that of the adapter a user gives, else `calibration.DEFAULT_DIM`.
          seconds: that reading may take where one is fitted; see `calibration.calibrate`.

        Raises:
          ConfigError: no memory of this model can have this `max_window` or `memory_dim`.
        """
        MemoryConfig(layers=(0,), max_window=max_window)
        self._wanted = memory_dim
        self._memory = candidates(config, DEFAULT_DIM if memory_dim is None else memory_dim)
        self._fingerprint, self._template = file.fingerprint(), chat_template(file)
        self._config, self._tokenizer, self._params = config, tokenizer, params
        self._max_window, self._mesh_layout, self._seconds = max_window, mesh_layout, seconds

    @property
    def unfitted(self) -> MemoryConfig:
        """The memory as it is before anything is fitted: its sizes are those of one that is."""
        return self._memory

    def there(self, path: Path | None, cache: Path | None) -> Fitted | None:
        """The one a user asks for, if there is one; else one that has been fitted before, or None.

        Raises:
          AdapterError: the one asked for cannot be used.
        """
        return self.kept(cache) if path is None else self.given(path)

    def given(self, path: Path) -> Fitted:
        """The one a user asks for.

        Raises:
          AdapterError: it cannot be read, is damaged, or was made for another model or another `memory_dim`.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise AdapterError(f"adapter file {path} cannot be read: {error.strerror}") from error
        fitted = self._fitted(data, "given")
        dim = fitted.config.components
        if self._wanted not in (None, dim):
            raise AdapterError(f"memory_dim is {self._wanted}, but adapter file {path} was fitted with {dim}")
        return fitted

    def kept(self, cache: Path | None) -> Fitted | None:
        """The one that comes with the library, else the one an earlier start has left in the cache folder."""
        default = self._memory.components == DEFAULT_DIM
        shipped = adapter_store.shipped_path(self._fingerprint) if default else None
        found = cache_folder.load("adapter", shipped, self._own(cache), self._decode)
        if found is None:
            return None
        _, data, file = found
        return self._fitted(data, "shipped" if file == shipped else "calibrated")

    def calibrated(self, cache: Path | None, progress: Progress | None = None) -> Fitted | None:
        """One that is fitted now, and left in the cache folder; None, with the reason in the log, if that fails.

        Args:
          progress: is told how far it is; None writes that into the log.

        Raises:
          FittingStopped: `progress` wants no more of it.
        """
        started = time.monotonic()
        log.info("[ATLAS] No memory has been fitted to this model yet; calibrating once, which may take minutes")
        try:
            texts = adapter_store.calibration_texts()
            found = calibrate_with(
                self._tokenizer,
                self._config,
                self._params,
                texts,
                _TOKENS,
                self._mesh_layout,
                progress or ProgressLog(CALIBRATING),
                self._memory,
                self._template,
                seconds=self._seconds,
            )
            data = adapter_store.encode(self._fingerprint, found.config, found.adapter)
            fitted = self._fitted(data, "calibrated")
        except FittingStopped:
            raise
        except Exception as error:  # whatever it is, the model can be served without
            log.warning(
                "[ATLAS] %s; it is served without (%s: %s). `python -m atlas_jax.recall.fit` fits one to other texts, and "
                "with the memory turned off a start does not try",
                NOT_FITTED,
                type(error).__name__,
                error,
            )
            log.debug("Calibration", exc_info=True)
            return None
        cache_folder.keep("adapter", self._own(cache), data)
        log.info(
            "[ATLAS] Calibrated in %.0f s: layers %s, loss past the window %.3f without and %.3f with the memory",
            time.monotonic() - started,
            found.config.layers,
            found.loss_window,
            found.loss_memory,
        )
        return fitted

    def _own(self, cache: Path | None) -> Path | None:
        if cache is None:
            return None
        return adapter_store.cached(cache / "adapters", self._fingerprint, self._memory.components)

    def _decode(self, data: bytes) -> tuple[MemoryConfig, Adapter]:
        return adapter_store.decode(data, self._fingerprint, self._config, max_window=self._max_window)

    def _fitted(self, data: bytes, source: str) -> Fitted:
        config, adapter = self._decode(data)
        return Fitted(config, adapter, hashlib.sha256(data).hexdigest(), source)
