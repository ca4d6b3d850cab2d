"""Which pairs a text keeps, by definition: float64, one layer and head after the other, pages as ranges of positions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from atlas_jax.config import ModelConfig
from tests.reference.transformer_reference import soft_capped, softmax

PAGE, SINKS, STRETCH, PROTECTED = 128, 4, 4, 1e6
"""Tokens of a page, tokens that are sinks, tokens between queries that count, and the score of what is protected."""


@dataclass
class Pair:
    """A pair that a head has kept; `place` is where its key stands for those that meet it."""

    position: int
    place: int
    score: float


@dataclass
class Kept:
    """What a head of a layer keeps in the end.

    Attributes:
      left: where the key of every position stands that has left the window, kept or not.
      close: positions that another order of sums may decide otherwise.
      k, v: of the whole text, the keys not rotated.
    """

    pairs: list[Pair] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)
    close: set[int] = field(default_factory=set)
    k: np.ndarray = field(default_factory=lambda: np.empty(0))
    v: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def positions(self) -> set[int]:
        return {pair.position for pair in self.pairs}


@dataclass
class KeptAttention:
    """Attention to a window, the sinks and the pairs kept of all before; an `attend` of `transformer_reference.logits`.

    Attributes:
      window, update: pages of the window, and of a group that leaves it together.
      capacity: the most pairs of a head, of each layer or of all.
      decay: what is left of their scores from one group to the next.
      protected: positions that are kept before all others.
      tolerance: relative difference of scores up to which either of two pairs may be kept.
      kept: what has been found, by layer and head.
    """

    window: int
    update: int
    capacity: int | Sequence[int]
    decay: float
    protected: Collection[int] = ()
    tolerance: float = 1e-4
    kept: dict[tuple[int, int], Kept] = field(default_factory=dict)
    rotate: dict[int, Callable[..., np.ndarray]] = field(default_factory=dict)

    def __call__(
        self,
        config: ModelConfig,
        index: int,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        rotate: Callable[..., np.ndarray],
        null_logit: np.ndarray | None = None,
    ) -> np.ndarray:
        self.rotate[index] = rotate
        out = np.empty_like(q)
        for head in range(config.kv_heads):
            group = slice(head * config.groups, (head + 1) * config.groups)
            null = None if null_logit is None else null_logit[group, None]
            out[:, group] = self._head(config, index, q[:, group], k[:, head], v[:, head], null, head)
        return out

    def most(self, index: int) -> int:
        """Pairs that a head of a layer keeps."""
        return self.capacity if isinstance(self.capacity, int) else self.capacity[index]

    def _left(self, page: int) -> int:
        return max(0, page - self.window + 1) // self.update * self.update

    def _head(
        self,
        config: ModelConfig,
        index: int,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        null_logit: np.ndarray | None,
        head: int,
    ) -> np.ndarray:
        """All tokens of one KV head: q [T, groups, D], k and v [T, D]."""
        rotate, last, sliding = self.rotate[index], config.context_length - 1, config.layers[index].sliding_window
        where = np.arange(len(q))
        far = rotate(q, where)
        near = rotate(q, np.minimum(where, last))
        keys = rotate(k[:, None], where)[:, 0]
        kept, received, out = Kept(k=k, v=v), np.zeros(len(q)), np.empty_like(q)
        noted = _in_8_bits(far)
        near_noted = rotate(noted, np.minimum(last - where, 0), 1.0)  # they are in their magnitude
        for page in range(-(-len(q) // PAGE)):
            start, before, now = page * PAGE, self._left(page - 1), self._left(page)

            def met(token: int, of_far: np.ndarray, of_near: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
                """Probabilities [groups, keys] of a token's queries, and values: the window, the sinks, what is kept."""
                begin = first * PAGE if sliding is None else max(first * PAGE, token - sliding + 1)
                score = [of_far[token] @ keys[begin : token + 1].T]
                values = [v[begin : token + 1]]
                if sliding is None and first:
                    places = [pair.place for pair in kept.pairs]
                    chosen = [pair.position for pair in kept.pairs]
                    others = np.concatenate([keys[:SINKS], rotate(k[chosen][:, None], np.asarray(places))[:, 0]])
                    score.append(of_near[token] @ others.T)
                    values += [v[:SINKS], v[chosen]]
                scores = soft_capped(np.concatenate(score, axis=1) * config.scale, config.attention_softcap)
                return softmax(scores, null_logit), np.concatenate(values)

            if now > before and sliding is None:
                received *= self.decay
                for pair in kept.pairs:
                    pair.score *= self.decay
                for token in range(start - PAGE + STRETCH - 1, start, STRETCH):
                    weight = met(token, noted, near_noted, before)[0].sum(axis=0)
                    window = token + 1 - before * PAGE
                    received[before * PAGE : token + 1] += weight[:window]
                    for pair, more in zip(kept.pairs, weight[window + SINKS :], strict=bool(before)):
                        pair.score += more
                self._exchange(kept, received, range(before * PAGE, now * PAGE), max(start - last, 0), self.most(index))
            for token in range(start, min(start + PAGE, len(q))):
                weight, values = met(token, far, near, now)
                out[token] = weight @ values
        self.kept[index, head] = kept
        return out

    def _exchange(self, kept: Kept, received: np.ndarray, leaving: range, beyond: int, most: int) -> None:
        """The highest scores of what is kept and what leaves."""
        for position in leaving:
            kept.left[position] = position - beyond
            if position >= SINKS:
                score = received[position] + PROTECTED * (position in self.protected)
                kept.pairs.append(Pair(position, position - beyond, score))
        kept.pairs.sort(key=lambda pair: (-pair.score, -pair.position))
        if len(kept.pairs) > most:
            cut = kept.pairs[most - 1].score, kept.pairs[most].score
            kept.close |= {
                pair.position
                for pair in kept.pairs
                if any(abs(pair.score - score) <= self.tolerance * score for score in cut)
            }
            del kept.pairs[most:]


def _in_8_bits(x: np.ndarray) -> np.ndarray:
    """Every row as 8-bit numbers in units of its largest."""
    unit = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / unit) * unit
