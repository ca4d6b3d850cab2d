"""Makes the bigram table that a model's drafts fall back on, from what the model writes by itself.

    python -m atlas_jax.engine.fit_bigrams MODEL.gguf [--ship | --cache FOLDER] [--tokens N] [--seed SEED]

No texts are needed: after the chat template's opening of a user's turn the model writes a question, then it answers that
(the way of Magpie, arXiv 2406.08464). Pairs of tokens are counted in the answers. By default the table goes where a server
with the default cache folder finds it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from atlas_jax.engine.api import Delta, Finished, GenerationRequest, SamplingParams
from atlas_jax.engine.config import default_cache
from atlas_jax.engine.engine import Engine
from atlas_jax.engine.offline import ask
from atlas_jax.engine.runner import bigram_table
from atlas_jax.engine.sessions.files import atomic_file
from atlas_jax.kernels.speculative_drafter import NONE
from atlas_jax.typing import Int32

_TOGETHER = 160
"""Questions asked for at once: the engine's batch stays full while the last of them end."""
_QUESTION, _ANSWER = 64, 240
"""Most tokens of a question, and of an answer. A question that is longer is thrown away."""
_BOLD, _USUAL = 1.0, 0.7
"""Temperatures of questions, which are to differ, and of answers, which are to be like those that will be drafted."""


def user_turn(engine: Engine) -> tuple[list[int], list[int]]:
    """What the chat template puts before the user's words, and between them and the answer."""
    one, other = (engine.render_chat([{"role": "user", "content": text}]) for text in ("red", "7 oxen"))
    begin = _common(one, other)
    end = _common(one[begin:][::-1], other[begin:][::-1])
    return one[:begin], one[len(one) - end :]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def write_answers(engine: Engine, tokens: int, seed: int, *, together: int = _TOGETHER) -> Int32[np.ndarray, "pairs 2"]:
    """Has the model ask and answer, `together` questions at once, until its answers have `tokens` tokens.

    Returns:
      Pairs (token, next token).

    Raises:
      ValueError: the model ends none of its questions.
    """
    before, after = user_turn(engine)
    pairs: list[np.ndarray] = []
    seeds = itertools.count(seed << 32)
    while sum(map(len, pairs)) < tokens:
        starts = [before] * together
        questions = [text for text, ended in _write(engine, starts, _QUESTION, _BOLD, seeds) if ended and text]
        if not questions:
            raise ValueError("the model ended none of its questions")
        starts = [[*before, *text, *after] for text in questions]
        for start, (text, _) in zip(starts, _write(engine, starts, _ANSWER, _USUAL, seeds), strict=True):
            whole = np.asarray([start[-1], *text], np.int32)
            pairs.append(np.stack([whole[:-1], whole[1:]], axis=1))
        print(f"{len(questions)} questions, {sum(map(len, pairs))} tokens of answers so far", flush=True)
    return np.concatenate(pairs)


def _write(
    engine: Engine, starts: Sequence[Sequence[int]], length: int, temperature: float, seeds: itertools.count[int]
) -> list[tuple[list[int], bool]]:
    """What the model writes after each start, and whether it came to an end."""
    requests = [
        GenerationRequest(
            prompt=start,
            max_tokens=length,
            sampling=SamplingParams(temperature=temperature, top_p=0.95, seed=next(seeds), logprobs=0),
        )
        for start in starts
    ]
    written = []
    for events in ask(engine, requests):
        tokens = [info.token for event in events if isinstance(event, Delta) for info in event.tokens]
        end = events[-1]
        written.append((tokens, isinstance(end, Finished) and end.reason == "stop"))
    return written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--ship", action="store_true", help="write it into the library, as the model's shipped table")
    target.add_argument("--cache", type=Path, default=default_cache(), help="a server's cache folder")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens of answers to count")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    context = 512  # question and answer are shorter
    engine = Engine.open(model_path=args.model, memory_enabled=False, max_context=context, speculate=False)
    try:
        pairs = write_answers(engine, args.tokens, args.seed)
    finally:
        engine.close(timeout=30)
    table = bigram_table.most_frequent(pairs, engine.model.vocab_size)
    fingerprint = engine.model.fingerprint
    shipped, kept = bigram_table.shipped_path(fingerprint), bigram_table.cached_path(args.cache, fingerprint)
    path = shipped if args.ship else kept
    with atomic_file(path) as file:
        file.write(bigram_table.encode(fingerprint, table))
    report = {
        "table": path.name,
        "pairs": len(pairs),
        "tokens_with_successor": int((table != NONE).sum()),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
