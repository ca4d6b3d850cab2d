"""What a session takes, in bytes, and how a budget is divided: the exact window first, the recall memory, then kept pairs."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from atlas_jax.config import PAGE, MemoryConfig, ModelConfig
from atlas_jax.engine.memory_options import MemoryOptions
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.model.transformer import init_kv
from atlas_jax.recall import recall_memory

DEFAULT_BUDGET = 16 << 20
_WINDOWS = 2.5
"""The default budget in exact windows of 512 tokens where those are large: a third of it is the window, then."""
_MOST_KEPT = 8192
"""Pairs kept at most, whatever there is room for."""


@dataclass(frozen=True)
class SessionBytes:
    """Bytes of a session's state.

    Attributes:
      window_page: of a page of the exact window.
      kept_page: of a page of kept pairs.
      memory: of the recall memory.
      rest: of what has one size: sinks, and the queries that kept pairs are chosen by.
    """

    window_page: int
    kept_page: int
    memory: int
    rest: int

    def total(self, window: int, kept: int) -> int:
        """A session with so many tokens in its window and so many kept pairs."""
        return window // PAGE * self.window_page + -(-kept // PAGE) * self.kept_page + self.memory + self.rest

    def kept(self, budget: int, window: int) -> int:
        """The pairs that fit into a budget beside a window, in whole pages."""
        room = budget - self.total(window, 0)
        return min(max(room // self.kept_page, 0) * PAGE, _MOST_KEPT) if self.kept_page else 0


def session_bytes(model: ModelConfig, memory: MemoryConfig, kv_dtype: KVDtype) -> SessionBytes:
    """What sessions of a model take."""

    def cache(pages: int, kept: int) -> int:
        return _bytes(jax.eval_shape(lambda: init_kv(model, 1, pages, kv_dtype, kept * PAGE)))

    one, kept_page = cache(1, 1), cache(1, 2) - cache(1, 1)
    window_page = cache(2, 1) - one
    return SessionBytes(
        window_page=window_page,
        kept_page=kept_page,
        memory=_bytes(jax.eval_shape(lambda: recall_memory.init_state(memory, 1, model.vocab))),
        rest=one - window_page - kept_page,
    )


def default_budget(sizes: SessionBytes) -> int:
    """Bytes of a session where nobody says how many."""
    window = MemoryOptions().window_size // PAGE * sizes.window_page
    return max(DEFAULT_BUDGET, int(_WINDOWS * window))


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
