"""The n-gram drafter of speculative decoding (prompt lookup): what followed the last place where the latest tokens occurred
before, else what usually follows the latest token (a bigram table).

Answers repeat names, code and phrases of what was read, and a decode step over several tokens of a row costs much less
than as many steps, for its weights are read once. The sampler checks every draft token against its own draw; a rejected
one changes nothing.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from atlas_jax.kernels.reductions import row_max
from atlas_jax.typing import Array, Int32

MATCH = 3
"""Latest tokens that are compared: the longest match wins, of equally long ones the latest."""
NONE = -1
"""No token."""


def draft_tokens(
    text: Int32[Array, "B ring"], last: Int32[Array, B], successor: Int32[Array, V], count: int
) -> Int32[Array, "B drafts"]:
    """Drafts the `count` tokens after position `last`.

    Args:
      text: the latest tokens of each row, position p at p mod ring; NONE where there is none.
      last: position of the latest token; it and the tokens before it are in `text`.
      successor: of every token the one that usually follows it, or NONE.

    Returns:
      The tokens. A match near the end is continued as a period: after "ab ab a" comes "b ab a". Where the latest token has
      not occurred before: its successor, that one's successor and so on, up to the first NONE.
    """
    ring = text.shape[1]
    index = jnp.arange(ring)
    position = last[:, None] - (last[:, None] - index) % ring  # of the token that each place holds
    length = jnp.zeros(text.shape, jnp.int32)
    matching = (text != NONE) & (position >= 0) & (position < last[:, None])
    row = jnp.arange(text.shape[0])[:, None]
    for back in range(MATCH):
        here = jnp.roll(text, back, axis=1)
        wanted = text[row, (last[:, None] - back) % ring]
        matching &= (here == wanted) & (position >= back) & (position - back > last[:, None] - ring)
        length += matching
    # one number that orders by length, then by place; exact in float32, whose maximum is fast
    rank = jnp.where(length > 0, length * ring - (last[:, None] - position), NONE).astype(jnp.float32)
    best = row_max(rank)[:, None].astype(jnp.int32)
    period = -best % ring  # best = length · ring − distance, 0 < distance < ring
    ahead = jnp.arange(count)[None] % jnp.maximum(period, 1)
    found = text[row, (last[:, None] - period + 1 + ahead) % ring]
    chain = [text[row[:, 0], last % ring]]
    for _ in range(count):
        chain.append(jnp.where(chain[-1] == NONE, NONE, successor[jnp.maximum(chain[-1], 0)]))
    return jnp.where(best > 0, found, jnp.stack(chain[1:], axis=1))


def ref_draft_tokens(text: np.ndarray, successor: np.ndarray, count: int) -> list[int]:
    """`draft_tokens` for one row's whole text [tokens], oldest first, and successors [V]: the definition."""
    last = len(text) - 1
    best, period = 0, 0
    for place in range(last):
        length = 0
        while length < MATCH and length <= place and text[place - length] == text[last - length]:
            length += 1
        if length and length >= best:
            best, period = length, last - place
    if best:
        return [int(text[last - period + 1 + i % period]) for i in range(count)]
    drafted, token = [], int(text[last])
    for _ in range(count):
        token = NONE if token == NONE else int(successor[token])
        drafted.append(token)
    return drafted
