"""Drawing the next token for every row of a batch, each with its own settings, without sorting the vocabulary.

Everything is a per-row array, so rows with different settings share one compiled step. A filter that no row uses is
skipped at run time. top-k, top-p and typical-p are one search for a threshold; a draw is one uniform number per row,
derived from the row's seed and the token's position alone, so a request repeats whatever its neighbours do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.config import MAX_LOGIT_BIAS
from atlas_jax.kernels.cpu import ffi
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.typing import Array, Bool, Float, Int, Int32, UInt32

NEGATIVE = -1e30
BIAS_SLOTS = MAX_LOGIT_BIAS
TOP_LOGPROBS = 20
_BLOCK = 128
_TINY = 2.0**-126
_MOST_COUNTED = 2**15 - 1
BAN, FORCE = -1e6, 1e4
"""What the ends of a bias, −100 and 100, add to a logit, so that they decide at any temperature."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """Settings and history of every row.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 is off.
      seed: identifies the random stream of the row.
      bias_token, bias: sparse additions to logits; unused entries name token V (dropped).
      generated: how often each token was generated.
      present: 1 where a token occurs in the prompt or the answer.
      logprobs: 1 where the row wants the best alternatives with every token.
    """

    temperature: Float[Array, B]
    top_k: Int32[Array, B]
    top_p: Float[Array, B]
    min_p: Float[Array, B]
    typical_p: Float[Array, B]
    repeat_penalty: Float[Array, B]
    presence_penalty: Float[Array, B]
    frequency_penalty: Float[Array, B]
    seed: UInt32[Array, "B 2"]
    bias_token: Int32[Array, "B slots"]
    bias: Float[Array, "B slots"]
    generated: Int[Array, "B V"]
    present: Int[Array, "B V"]
    logprobs: Int32[Array, B]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sample:
    """What was drawn.

    Attributes:
      token: the draw.
      logprob: natural log of its probability before temperature, penalties and filters.
      top_token, top_logprob: the TOP_LOGPROBS best alternatives, zeros unless a row of the batch wants them.
    """

    token: Int32[Array, B]
    logprob: Float[Array, B]
    top_token: Int32[Array, "B top"]
    top_logprob: Float[Array, "B top"]


def init_sampling(batch: int, vocab: int) -> SamplingState:
    """Greedy rows without history."""

    def full(value: float) -> jax.Array:
        return jnp.full((batch,), value, jnp.float32)

    return SamplingState(
        temperature=full(0.0),
        top_k=jnp.zeros((batch,), jnp.int32),
        top_p=full(1.0),
        min_p=full(0.0),
        typical_p=full(1.0),
        repeat_penalty=full(1.0),
        presence_penalty=full(0.0),
        frequency_penalty=full(0.0),
        seed=jnp.zeros((batch, 2), jnp.uint32),
        bias_token=jnp.full((batch, BIAS_SLOTS), vocab, jnp.int32),
        bias=jnp.zeros((batch, BIAS_SLOTS), jnp.float32),
        generated=jnp.zeros((batch, vocab), jnp.int16),
        present=jnp.zeros((batch, vocab), jnp.int8),
        logprobs=jnp.zeros((batch,), jnp.int32),
    )


def allowed_words(vocab: int) -> int:
    """Words of 32 bits that hold a bit for every token."""
    return -(-vocab // 32)


def sample(
    state: SamplingState,
    scores: Float[Array, "B V"],
    position: Int32[Array, B],
    allowed: Int32[Array, "B words"] | None = None,
) -> Sample:
    """Draws one token per row.

    Args:
      scores: logits, any additive constant per row.
      position: absolute position the token will have; with the seed it fixes the draw.
      allowed: bit t mod 32 of word t // 32 says whether token t may be drawn, at least one per row; None allows all.
    """
    greedy, log_mass = _greedy(scores)
    changed = jnp.any(_penalizes(state)) | jnp.any(state.bias != 0)
    if allowed is not None:
        changed |= jnp.any(allowed != -1)
    # a branch hands over tokens, never scores: one that did would copy them even where it changes nothing
    token = jax.lax.cond(
        changed,
        lambda: _choose_changed(state, scores, position, allowed),
        lambda: _choose(state, scores, position, greedy),
    )
    logprob = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0] - log_mass
    top_logprob, top_token = jax.lax.cond(
        jnp.any(state.logprobs > 0),
        lambda: tuple(jax.lax.top_k(scores - log_mass[:, None], TOP_LOGPROBS)),
        lambda: (
            jnp.zeros((scores.shape[0], TOP_LOGPROBS), scores.dtype),
            jnp.zeros((scores.shape[0], TOP_LOGPROBS), jnp.int32),
        ),
    )
    return Sample(token, logprob, top_token, top_logprob)


def record(state: SamplingState, tokens: Int32[Array, "B T"], drawn: Bool[Array, "B T"]) -> SamplingState:
    """Adds drawn tokens to the history of each row."""
    row = jnp.arange(tokens.shape[0])[:, None]
    index = jnp.where(drawn, tokens, state.generated.shape[1])
    generated = state.generated.at[row, index].add(1, mode="drop")
    # a token that comes 32 768 times would turn its frequency penalty into a reward
    count = generated.at[row, index].get(mode="fill", fill_value=0)
    return dataclasses.replace(
        state,
        generated=generated.at[row, index].set(jnp.where(count < 0, _MOST_COUNTED, count), mode="drop"),
        present=state.present.at[row, index].set(1, mode="drop"),
    )


def _greedy(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of the best tokens, and the logarithm of Σ exp(score)."""
    if ffi.takes_vocabulary():
        return ffi.greedy(scores)
    best = row_max(scores)
    return _first_best(scores), best + jnp.log(row_sum(jnp.exp(scores - best[:, None])))


def _choose_changed(
    state: SamplingState, scores: jax.Array, position: jax.Array, allowed: jax.Array | None
) -> Int32[Array, B]:
    """The token of every row after penalties, biases and what a grammar allows."""
    scores = _penalize(state, scores)
    if allowed is not None:
        scores = jax.lax.cond(jnp.any(allowed != -1), lambda x: _restrict(x, allowed), lambda x: x, scores)
    return _choose(state, scores, position, _first_best(scores))


def _choose(state: SamplingState, scores: jax.Array, position: jax.Array, greedy: jax.Array) -> Int32[Array, B]:
    """The best token, or for rows with a temperature one that is drawn."""
    drawn = state.temperature > 0
    return jax.lax.cond(
        jnp.any(drawn), lambda: jnp.where(drawn, _draw(state, scores, position), greedy), lambda: greedy
    )


def _penalizes(state: SamplingState) -> Bool[Array, B]:
    return (state.repeat_penalty != 1) | (state.presence_penalty != 0) | (state.frequency_penalty != 0)


def _penalize(state: SamplingState, scores: jax.Array) -> jax.Array:
    """Repeat penalty (CTRL's, on prompt and answer), presence and frequency penalties (on the answer), logit bias."""

    def penalties(x: jax.Array) -> jax.Array:
        repeat = jnp.where(state.present > 0, state.repeat_penalty[:, None], 1.0)
        x = jnp.where(x > 0, x / repeat, x * repeat)
        count = state.generated.astype(jnp.float32)
        return x - state.presence_penalty[:, None] * (count > 0) - state.frequency_penalty[:, None] * count

    def biases(x: jax.Array) -> jax.Array:
        row = jnp.arange(x.shape[0])[:, None]
        return x.at[row, state.bias_token].add(state.bias, mode="drop")

    scores = jax.lax.cond(jnp.any(_penalizes(state)), penalties, lambda x: x, scores)
    return jax.lax.cond(jnp.any(state.bias != 0), biases, lambda x: x, scores)


def _restrict(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    bits = (allowed[:, :, None] >> jnp.arange(32)) & 1
    return jnp.where(bits.reshape(allowed.shape[0], -1)[:, : scores.shape[1]] == 1, scores, NEGATIVE)


def _first_best(x: jax.Array) -> jax.Array:
    """argmax, lowest token on ties. XLA's own argmax on CPU is a scalar loop over pairs."""
    best = row_max(x)[:, None]
    index = jnp.where(x == best, -jax.lax.broadcasted_iota(jnp.float32, x.shape, 1), NEGATIVE)
    return (-row_max(index)).astype(jnp.int32)


def _draw(state: SamplingState, scores: jax.Array, position: jax.Array) -> jax.Array:
    uniform = _uniform(state.seed, position)
    if ffi.takes_vocabulary():
        return ffi.draw(
            scores,
            temperature=state.temperature,
            top_k=state.top_k,
            typical_p=state.typical_p,
            top_p=state.top_p,
            min_p=state.min_p,
            uniform=uniform,
        )
    temperature = jnp.where(state.temperature > 0, state.temperature, 1.0)[:, None]
    # the best token's exponent is exactly 0 however small the temperature: there is always a weight to draw from
    weight = _filter(state, jnp.exp((scores - row_max(scores)[:, None]) / temperature))
    return _inverse_cdf(weight, uniform)


def _filter(state: SamplingState, weight: jax.Array) -> jax.Array:
    """Zeroes the weight of tokens that top-k, typical-p, top-p or min-p exclude, in this order."""
    vocab = weight.shape[1]

    def top_k(w: jax.Array) -> jax.Array:
        k = jnp.where(state.top_k > 0, state.top_k, vocab).astype(jnp.float32)
        return jnp.where(w >= -_mass_threshold(-w, jnp.ones_like(w), k)[:, None], w, 0.0)

    def typical(w: jax.Array) -> jax.Array:
        p = w / row_sum(w)[:, None]
        surprise = -jnp.log(jnp.maximum(p, _TINY))  # anything smaller is flushed to 0
        distance = jnp.abs(surprise - row_sum(p * surprise)[:, None])
        distance = jnp.where(p > 0, distance, 1e30)
        limit = _mass_threshold(distance, p, state.typical_p)
        return jnp.where((state.typical_p >= 1)[:, None] | (distance <= limit[:, None]), w, 0.0)

    def top_p(w: jax.Array) -> jax.Array:
        p = w / row_sum(w)[:, None]
        limit = -_mass_threshold(-p, p, state.top_p)
        return jnp.where((state.top_p >= 1)[:, None] | (p >= limit[:, None]), w, 0.0)

    def min_p(w: jax.Array) -> jax.Array:
        return jnp.where(w >= state.min_p[:, None] * row_max(w)[:, None], w, 0.0)

    for used, step in (
        (state.top_k > 0, top_k),
        (state.typical_p < 1, typical),
        (state.top_p < 1, top_p),
        (state.min_p > 0, min_p),
    ):
        weight = jax.lax.cond(jnp.any(used & (state.temperature > 0)), step, lambda w: w, weight)
    return weight


def _mass_threshold(cost: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """Smallest value t of `cost` such that the tokens with cost ≤ t weigh `target`, and more than nothing, per row.

    Where all together weigh less, as rounding can have it, t takes in all of any weight. Bisection on the ordered
    integers behind the floats: 32 passes find the threshold exactly.
    """
    keys = _ordered(cost)
    target = jnp.minimum(target, row_sum(mass))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # mass(≤ low) < target ≤ mass(≤ high)
        middle = low // 2 + high // 2 + (low % 2 + high % 2) // 2
        weight = row_sum(jnp.where(keys <= middle[:, None], mass, 0.0))
        enough = (weight >= target) & (weight > 0)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    rows = cost.shape[:1]
    low, high = jnp.full(rows, -(2**31) + 1, jnp.int32), jnp.full(rows, 2**31 - 1, jnp.int32)
    _, threshold = jax.lax.fori_loop(0, 32, halve, (low, high))
    return _unordered(threshold)


def _ordered(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, ~bits ^ jnp.int32(-(2**31)), bits)


def _unordered(key: jax.Array) -> jax.Array:
    bits = jnp.where(key < 0, ~(key ^ jnp.int32(-(2**31))), key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
    """One number in (0, 1) per row from its seed and a position."""

    def one(row_seed: jax.Array, row_position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(row_seed, impl="threefry2x32"), row_position)
        return jax.random.uniform(key, (), jnp.float32, minval=_TINY)

    return jax.vmap(one)(seed, position)


def _inverse_cdf(weight: jax.Array, uniform: jax.Array) -> jax.Array:
    """Token at which the running sum of weights passes `uniform` of the total; never one of weight zero.

    Two levels, blocks of 128 tokens and then one block: a running sum over the whole vocabulary is slow and less exact.
    """
    batch, vocab = weight.shape
    padded = jnp.pad(weight, ((0, 0), (0, -vocab % _BLOCK))).reshape(batch, -1, _BLOCK)
    block_mass = row_sum(padded)
    running = jnp.cumsum(block_mass, axis=1)
    target = uniform * running[:, -1]
    block = jnp.argmax((running > target[:, None]) & (block_mass > 0), axis=1)
    before = (
        jnp.take_along_axis(running, block[:, None], axis=1)[:, 0]
        - jnp.take_along_axis(block_mass, block[:, None], axis=1)[:, 0]
    )
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    sums = jnp.cumsum(inside, axis=1)
    hit = (sums > (target - before)[:, None]) & (inside > 0)
    # rounding can leave the target a hair past the block's own sum: then it is the block's last token of any weight
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=1)
    return (block * _BLOCK + jnp.where(jnp.any(hit, axis=1), jnp.argmax(hit, axis=1), last)).astype(jnp.int32)
