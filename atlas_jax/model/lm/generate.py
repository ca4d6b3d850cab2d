"""Text from a model in this process, without the engine: for a look at what a run has learned."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.model import LMParams
from atlas_jax.model.lm.streaming import LMState, bounded, extend, init_state, logits
from atlas_jax.typing import Array, Float, Int32

_PIECES = (64, 8, 1)
"""Lengths a prompt is read in: each is a program of its own."""


def generate(
    config: LMConfig,
    params: LMParams,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Tokens that follow a prompt, one at a time as they are drawn.

    Args:
      prompt: token ids, at least one.
      temperature: 0 takes the most probable token.
      top_k: draws from so many most probable tokens; 0 from all.
      stop: a token that ends the text, and is not given.

    Raises:
      ValueError: an empty prompt, a token that the model does not have, or a setting out of its range; before the first
        token is drawn.
    """
    if not prompt or not all(0 <= token < config.vocab for token in prompt):
        raise ValueError(f"prompt: needs token ids from 0 to {config.vocab - 1}, at least one")
    if max_tokens < 0 or temperature < 0 or top_k < 0:
        raise ValueError("max_tokens, temperature and top_k must not be negative")
    context = None if bounded(config) else max(config.context_length, len(prompt) + max_tokens)
    return _tokens(config, params, prompt, max_tokens, temperature, min(top_k, config.vocab), seed, stop, context)


def _tokens(
    config: LMConfig,
    params: LMParams,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    stop: int | None,
    context: int | None,
) -> Iterator[int]:
    params = jax.tree.map(jnp.asarray, params)
    state = init_state(config, params, 1, context=context)
    start, scores = 0, None
    for length in _PIECES:
        while len(prompt) - start >= length:
            piece = np.asarray([prompt[start : start + length]], np.int32)
            state, scores = _read(config, params, state, piece)
            start += length
    key = jax.random.key(seed)
    for index in range(max_tokens):
        assert scores is not None
        token = _draw(top_k, scores, jax.random.fold_in(key, index), np.float32(temperature))
        if int(token) == stop:
            return
        yield int(token)
        if index + 1 < max_tokens:
            state, scores = _read(config, params, state, token[None, None])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(
    config: LMConfig, params: LMParams, state: LMState, tokens: Int32[Array, "1 T"]
) -> tuple[LMState, Float[Array, " V"]]:
    state, hidden = extend(config, params, state, tokens, jnp.ones(1, bool))
    return state, logits(config, params, hidden[0, -1])


@functools.partial(jax.jit, static_argnums=0)
def _draw(top_k: int, scores: Float[Array, " V"], key: jax.Array, temperature: Float[Array, ""]) -> Int32[Array, ""]:
    if top_k:
        scores = jnp.where(scores < jax.lax.top_k(scores, top_k)[0][-1], -jnp.inf, scores)
    drawn = jax.random.categorical(key, scores / jnp.where(temperature > 0, temperature, 1.0))
    return jnp.where(temperature > 0, drawn, jnp.argmax(scores)).astype(jnp.int32)
