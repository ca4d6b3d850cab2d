"""Where a decode step's time goes, against what reading its weights from memory must take.

    python -m benchmarks.step_time MODEL.gguf [--steps 1x1 1x3 16x1] [--output docs/benchmarks/step_time.md]

A step is ROWSxTOKENS. Parts are timed on their own, programs of the same functions the engine compiles: the products of
all layers with their norms and gates, their attention, all layers in groups, the head's product, the choice of a token.
What the layers take beyond their products and attention is rotations, cache writes and the gaps between programs.
"Engine" is a whole step of the running engine, which for one row is one program without the gaps, and has the host's
work beside it. Times are medians of `--repeats` in milliseconds.

Memory bandwidth is what all cores together reach in reading large float32 arrays for their largest number.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished, GenerationRequest, SamplingParams
from atlas_jax.engine.offline import ask
from atlas_jax.engine.runner.step_inputs import sampling_state
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.attention import window_attention
from atlas_jax.kernels.fused_linear import gated_linear, summed_linear
from atlas_jax.kernels.linear import linear
from atlas_jax.kernels.sampling import sample
from atlas_jax.model.kv_cache import init_kv_cache, page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import logits

PAGES = 4
_CONTEXT = 256
_DECODED = 64


def bandwidth(repeats: int) -> float:
    """Bytes per second that all cores together read."""
    cores = os.cpu_count() or 1
    arrays = [np.ones(64 << 20, np.float32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        seconds = [_seconds(lambda: list(pool.map(np.max, arrays))) for _ in range(repeats)]
    return sum(a.nbytes for a in arrays) / min(seconds)


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def median(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of one call, the first two calls left out."""
    return 1e3 * statistics.median([_seconds(run) for _ in range(repeats + 2)][2:])


def parts(config: ModelConfig, params: ModelParams, rows: int, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of the parts of a step."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((rows, tokens, config.embed)), jnp.float32)
    wide = jnp.asarray(random.standard_normal((rows, tokens, 2 * config.ff)), jnp.float32)
    mixed = jnp.asarray(random.standard_normal((rows, tokens, config.heads * config.head_dim)), jnp.float32)
    queries = mixed.reshape(rows, tokens, config.heads, config.head_dim)
    turn = jax.jit(start_page, donate_argnums=0)
    context = init_kv_cache(config, rows, PAGES, "int8")
    for page in range(_CONTEXT // PAGE + 1):
        for row in range(rows):
            context = turn(context, page_start(row, PageSchedule(None).next_page(page)))
    start = jnp.full(rows, _CONTEXT, jnp.int32)
    seen = jnp.broadcast_to(
        jnp.arange(PAGES)[:, None] * PAGE + jnp.arange(PAGE) < _CONTEXT, (rows, tokens, PAGES, PAGE)
    )
    sinks = jnp.ones((rows, tokens), bool)

    @jax.jit
    def products(layers: Any) -> list[Any]:
        return [
            part
            for layer in layers
            for part in (
                summed_linear(layer.qkv, hidden, hidden, layer.ff_post_norm, layer.attn_norm, config.norm_eps),
                linear(layer.out, mixed),
                summed_linear(layer.gate_up, hidden, hidden, layer.attn_post_norm, layer.ff_norm, config.norm_eps),
                gated_linear(layer.down, wide, config.ff_block, config.activation),
            )
        ]

    attend = jax.jit(lambda kv: [window_attention(queries, queries, one, seen, sinks, config.scale) for one in kv])
    head = jax.jit(lambda params, hidden: logits(config, params, hidden).reshape(rows * tokens, -1))
    scores = head(params, hidden)
    greedy = jax.tree.map(
        lambda leaf: jnp.repeat(jnp.asarray(leaf), rows * tokens, axis=0),
        sampling_state(SamplingParams(temperature=0.0), config.vocab, 0, ()),
    )
    choose = jax.jit(lambda state, scores: sample(state, scores, jnp.zeros(rows * tokens, jnp.int32)))
    out = {
        "products": median(lambda: products(params.layers), repeats),
        "attention": median(lambda: attend(context.kv), repeats),
        "head": median(lambda: head(params, hidden), repeats),
        "choice": median(lambda: choose(greedy, scores), repeats),
    }
    trunk, held = Trunk(config), [context]
    fed = random.integers(300, 1000, (rows, tokens)).astype(np.int32)
    every = np.full(rows, tokens, np.int32)

    def layers() -> jax.Array:
        """The same place of the text every time."""
        here = dataclasses.replace(held[0], position=start)
        held[0], _, states = trunk((rows, PAGES, tokens), params, here, fed, every)
        return states[-1]

    return {**out, "layers": median(layers, repeats)}


def engine_step(engine: Engine, rows: int, repeats: int) -> float:
    """Milliseconds of a step of the running engine."""
    text = engine.tokenizer.encode(
        "The river ran past the mill and the village. " * 60, add_special=True, parse_special=False
    )
    prompts = [text[row : row + _CONTEXT] for row in range(rows)]
    found = []
    for _ in range(repeats):
        requests = [
            GenerationRequest(
                prompt=prompt,
                max_tokens=_DECODED,
                sampling=SamplingParams(temperature=0.0),
                ignore_eos=True,
                reuse=False,
            )
            for prompt in prompts
        ]
        ends = [events[-1] for events in ask(engine, requests)]
        found.append(min(end.decode_seconds for end in ends if isinstance(end, Finished)) / (_DECODED - 1))
    return 1e3 * statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", nargs="+", default=["1x1", "1x3", "16x1"])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    speed = bandwidth(5)
    with GGUFFile.open(args.model) as file:
        config = model_config(file)
        params = load_params(file, config)

    def stored(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim > 1)

    table = params.embed if params.head is None else params.head
    limits = {"products": stored(params.layers), "head": stored(table)}
    least = {name: f"{1e3 * size / speed:.1f} ({size / 1e6:.0f} MB)" for name, size in limits.items()}
    steps = [tuple(int(n) for n in step.split("x")) for step in args.steps]
    measured = [parts(config, params, rows, tokens, args.repeats) for rows, tokens in steps]
    with_engine = [rows for rows, tokens in steps if tokens == 1]
    whole = {}
    if with_engine:
        engine = Engine.open(
            model_path=args.model, memory_enabled=False, max_concurrent=max(with_engine), speculate=False
        )
        engine.warm_up()
        whole = {rows: engine_step(engine, rows, 5) for rows in with_engine}
        engine.close(timeout=10)
    lines = [f"| ms | least by bandwidth | {' | '.join(args.steps)} |", "|---|---|" + "---|" * len(steps)]
    for name in ("products", "attention"):
        lines.append(f"| {name} of all layers | {least.get(name, '')} | " + _cells(found[name] for found in measured))
    rest = (found["layers"] - found["products"] - found["attention"] for found in measured)
    lines.append("| the rest of the layers | | " + _cells(rest))
    for name in ("head", "choice"):
        lines.append(f"| {name} | {least.get(name, '')} | " + _cells(found[name] for found in measured))
    sums = [found["layers"] + found["head"] + found["choice"] for found in measured]
    lines.append("| sum | | " + _cells(sums))
    lines.append("| engine | | " + _cells(whole[r] if t == 1 else None for r, t in steps))
    text = (
        f"{args.model.stem}, memory read at {speed / 1e9:.1f} GB/s by {os.cpu_count()} cores\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if args.output:
        args.output.write_text(text)


def _cells(values: Any) -> str:
    return " | ".join("" if value is None else f"{value:.1f}" for value in values) + " |"


if __name__ == "__main__":
    main()
