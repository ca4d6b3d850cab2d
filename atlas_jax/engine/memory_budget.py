"""What a session takes, in bytes, and how a budget is divided: the exact window first, the recall memory, then kept pairs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax

from atlas_jax.config import PAGE, MemoryConfig, ModelConfig
from atlas_jax.engine.api import StateBytes
from atlas_jax.engine.memory_options import MemoryOptions
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.model import delta_net
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kv_cache import init_kv_cache
from atlas_jax.recall import recall_state

DEFAULT_BUDGET = 16 << 20
_WINDOWS = 2.5
"""The default budget in exact windows of 512 tokens where those are large: a third of it is the window, then."""
_MOST_KEPT = 8192
"""Pairs kept at most per layer, on average, whatever there is room for."""


@dataclass(frozen=True)
class SessionBytes:
    """Bytes of a session's state.

    Attributes:
      sinks: of the first tokens, which stay.
      window_page: of a page of the exact window.
      kept_page: of a page of kept pairs for each layer that keeps any; 0 where all have a window of their own.
      score_page, queries: of what kept pairs are chosen by: of a page of the window, and of the latest page's queries.
      memory: of the recall memory.
      states: of layers that keep one in place of attention; nothing the budget could save.
    """

    sinks: int
    window_page: int
    kept_page: int
    score_page: int
    queries: int
    memory: int
    states: int = 0

    def parts(self, ring: int, kept: int, budget: int) -> StateBytes:
        """A session whose window has room for so many tokens, and that keeps so many pairs at most."""
        pages, kept_pages = ring // PAGE, -(-kept // PAGE)
        choice = pages * self.score_page + self.queries if kept_pages else 0
        return StateBytes(
            window=self.sinks + pages * self.window_page,
            kept=kept_pages * self.kept_page + choice,
            memory=self.memory + self.states,
            budget=budget,
        )

    def total(self, ring: int, kept: int) -> int:
        """All parts of such a session."""
        return self.parts(ring, kept, 0).total

    def kept(self, budget: int, ring: int) -> int:
        """The pairs that fit into a budget beside a window, in whole pages."""
        if not self.kept_page:
            return 0
        room = budget - self.total(ring, PAGE) + self.kept_page
        return min(max(room // self.kept_page, 0) * PAGE, _MOST_KEPT)


def session_bytes(model: ModelConfig, memory: MemoryConfig, kv_dtype: KVDtype) -> SessionBytes:
    """What sessions of a model take."""

    division = KeptDivision.of(model)  # as many pages in all, however they are divided

    def cache(pages: int, kept: int) -> int:
        rows = jax.eval_shape(lambda: init_kv_cache(model, 1, pages, kv_dtype, division.pages(kept)))
        return _bytes((rows.kv, rows.pairs))

    states = 0
    if model.delta_net is not None:
        one = _bytes(jax.eval_shape(functools.partial(delta_net.init_state, model.delta_net, 1)))
        states = one * sum(layer.kind == "delta_net" for layer in model.layers)
    window_page = cache(2, 0) - cache(1, 0)
    kept_page = cache(1, 2) - cache(1, 1)
    score_page = cache(2, 1) - cache(1, 1) - window_page
    return SessionBytes(
        sinks=cache(1, 0) - window_page - states,
        window_page=window_page,
        kept_page=kept_page,
        score_page=score_page,
        queries=cache(1, 1) - cache(1, 0) - kept_page - score_page,
        memory=_bytes(jax.eval_shape(lambda: recall_state.init_state(memory, 1, model.vocab))),
        states=states,
    )


def default_budget(sizes: SessionBytes) -> int:
    """Bytes of a session where nobody says how many."""
    window = MemoryOptions().window_size // PAGE * sizes.window_page
    return sizes.states + max(DEFAULT_BUDGET, int(_WINDOWS * window))


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
