"""Rows of which every device has all, so that a host can read them: what is kept of a session."""

from __future__ import annotations

from typing import Any

import jax

from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.runner.pretrained import PretrainedRunner


class WholeRows:
    """A compiled gather of a row of any size; all processes call it together."""

    def __init__(self, runner: PretrainedRunner) -> None:
        """Compiles nothing yet."""
        self._runner = runner
        whole = runner.mesh_layout.whole()
        where: dict[str, Any] = {} if whole is None else {"out_shardings": whole}
        self._jitted = jax.jit(lambda row: row, **where)
        self._ready: dict[int, jax.stages.Compiled] = {}

    def compile(self, pages: int) -> None:
        """Compiles it for rows with a ring of `pages` pages."""
        shapes = self._runner.mesh_layout.rows(self._runner.row_shapes(pages))
        self._ready.setdefault(pages, self._jitted.lower(shapes).compile())

    def __call__(self, row: Sequences) -> Sequences:
        """The row, whole."""
        pages = int(row.cache.page.shape[1])
        if pages not in self._ready:
            self.compile(pages)
        whole: Sequences = self._ready[pages](row)
        return whole
