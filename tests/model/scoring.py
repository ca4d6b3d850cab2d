"""The product's scores of a text, read page by page as the engine reads prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.engine.runner import step
from atlas_jax.engine.runner.step import StepConfig
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kept_pairs import leaving
from atlas_jax.model.kv_cache import KVCache, init_kv_cache, page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import logits


@functools.cache
def programs(config: ModelConfig, turn_tokens: tuple[int, ...] = ()) -> tuple[Trunk, Any, Any]:
    keep = functools.partial(step.keep_pairs, StepConfig(config, None, turn_tokens=turn_tokens))
    return Trunk(config), jax.jit(functools.partial(logits, config)), jax.jit(keep)


def scores(
    config: ModelConfig, params: ModelParams, text: Sequence[int], kv_dtype: KVDtype, plan: PageSchedule
) -> np.ndarray:
    """Scores of every next token at every position."""
    return read(config, params, text, kv_dtype, plan)[0]


def read(
    config: ModelConfig,
    params: ModelParams,
    text: Sequence[int],
    kv_dtype: KVDtype,
    plan: PageSchedule,
    *,
    kept: int = 0,
    weights: Sequence[float] = (),
    decay: float = 1.0,
    turn_tokens: tuple[int, ...] = (),
) -> tuple[np.ndarray, KVCache]:
    """Scores of every next token at every position, and the cache that the text leaves.

    Args:
      kept: the most pairs that are kept of what leaves the window, in each layer on average.
      weights: shares of them of the layers.
      decay: of their scores, from one group of pages that leave to the next.
      turn_tokens: as `StepConfig.turn_tokens`.
    """
    trunk, head, keep = programs(config, turn_tokens)
    length, division = len(text), KeptDivision.of(config, weights)
    room = division.pages(-(-kept // PAGE))
    whole = np.zeros((1, -(-length // PAGE) * PAGE), np.int32)
    whole[0, :length] = text
    context = init_kv_cache(config, 1, plan.ring(length), kv_dtype, room)
    out = []
    for page in range(-(-length // PAGE)):
        part = text[page * PAGE : (page + 1) * PAGE]
        begins = plan.next_page(page)
        for slot in begins.leaves if kept else ():
            leaves = leaving(0, slot, first=slot == begins.leaves[0], decay=decay, capacity=division.capacities(kept))
            context = keep(params.pairs, context, whole, leaves)
        context = start_page(context, page_start(0, begins))
        key = (kv_dtype, plan.ring(length), room)
        tokens = whole[:, page * PAGE : (page + 1) * PAGE]
        context, _, states = trunk(key, params, context, tokens, np.asarray([len(part)], np.int32))
        out.append(np.asarray(head(params, states[-1]))[0, : len(part)])
    return np.concatenate(out), context
