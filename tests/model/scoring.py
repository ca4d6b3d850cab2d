"""The product's scores of a text, read page by page as the engine reads prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.model.kv_cache import init_kv_cache, page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import logits


@functools.cache
def programs(config: ModelConfig) -> tuple[Trunk, object]:
    return Trunk(config), jax.jit(functools.partial(logits, config))


def scores(
    config: ModelConfig, params: ModelParams, text: Sequence[int], kv_dtype: KVDtype, plan: PageSchedule
) -> np.ndarray:
    """Scores of every next token at every position."""
    trunk, head = programs(config)
    length = len(text)
    context = init_kv_cache(config, 1, plan.ring(length), kv_dtype)
    out = []
    for page in range(-(-length // PAGE)):
        part = text[page * PAGE : (page + 1) * PAGE]
        context = start_page(context, page_start(0, plan.next_page(page)))
        tokens = np.zeros((1, PAGE), np.int32)
        tokens[0, : len(part)] = part
        key = (kv_dtype, plan.ring(length))
        context, _, states = trunk(key, params, context, tokens, np.asarray([len(part)], np.int32))
        out.append(np.asarray(head(params, states[-1]))[0, : len(part)])
    return np.concatenate(out)
