"""How fast llama.cpp reads and writes: prompt processing and decoding with 1 to 32 parallel sequences.

    PEER_PYTHON benchmarks/peer/speed.py MODEL.gguf [MODEL.gguf ...] [--tests prompt:512 decode:16x256 ...]
        [--threads 2] [--repeats 3] [--steps 32] [--flash-attention] [--no-sampling] [--plain-weights]
        [--system-info]

where PEER_PYTHON has llama-cpp-python. A test is `prompt:TOKENS` (one prompt, empty cache) or `decode:STREAMSxCONTEXT`
(that many sequences, each with its own copy of that many tokens already read; then --steps tokens each). Every test
prints one JSON line; `seconds` has one entry a repeat, after one warm-up, and `tokens_per_second` is for their median.
`cores` is CPU time over wall time: the library's threads wait by spinning, so below 0.95 x threads something else had
the machine, and the figure, which then collapses, says nothing. With --repeats 1 a driver can call it in turns with
another engine.

Settings: KV cache f16, prompts in batches of 2048 split into 512 by the library, the next token of each sequence by
argmax over its logits (numpy), as a greedy server would; --no-sampling feeds fixed tokens and leaves the logits alone.
Each sequence has its own cache buffer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llama_peer import Peer, system_info, version

TESTS = ["prompt:512", "prompt:4096", "decode:1x256", "decode:4x256", "decode:16x256", "decode:32x256"]


class Timing(NamedTuple):
    wall: float
    cpu: float


def random_tokens(count: int, vocab: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256, vocab), k=count)


def timed(run: Callable[[], None]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def time_prompt(peer: Peer, tokens: int, repeats: int) -> list[Timing]:
    prompt = random_tokens(tokens, peer.vocab_size, 0)

    def run() -> None:
        peer.prefill(prompt).argmax()

    timings = []
    for _ in range(repeats + 1):
        peer.clear()
        timings.append(timed(run))
    return timings[1:]


def time_decode(peer: Peer, streams: int, context: int, steps: int, repeats: int, sampling: bool) -> list[Timing]:
    prompt = random_tokens(context, peer.vocab_size, 0)
    first = [int(peer.prefill(prompt).argmax())] * streams
    for stream in range(1, streams):
        peer.share(0, stream)  # every sequence has its own buffer, so this is a copy and costs later steps nothing
    sequences, outputs = range(streams), [True] * streams

    def run() -> None:
        tokens = first
        for step in range(steps):
            logits = peer.decode(tokens, [context + step] * streams, sequences, outputs)
            if sampling:
                tokens = np.argmax(logits, axis=-1).tolist()

    timings = []
    for _ in range(repeats + 1):
        peer.forget(context)
        timings.append(timed(run))
    return timings[1:]


def run(path: Path, test: str, args: argparse.Namespace) -> dict[str, object]:
    kind, _, size = test.partition(":")
    streams, context = (int(n) for n in size.split("x")) if kind == "decode" else (1, int(size))
    room = context + (args.steps if kind == "decode" else 0)
    peer = Peer(
        path,
        context=-(-room // 256) * 256,
        sequences=streams,
        threads=args.threads,
        flash_attention=args.flash_attention,
        extra_buffers=not args.plain_weights,
    )
    if kind == "prompt":
        timings, tokens = time_prompt(peer, context, args.repeats), context
    else:
        timings = time_decode(peer, streams, context, args.steps, args.repeats, not args.no_sampling)
        tokens = streams * args.steps
    peer.close()
    return {
        "engine": version(),
        "model": path.stem,
        "test": kind,
        "streams": streams,
        "context": context,
        "tokens_per_second": round(tokens / statistics.median(t.wall for t in timings), 1),
        "seconds": [round(t.wall, 4) for t in timings],
        "cores": round(sum(t.cpu for t in timings) / sum(t.wall for t in timings), 2),
        "tokens": tokens,
        "threads": args.threads,
        "flash_attention": args.flash_attention,
        "sampling": kind == "prompt" or not args.no_sampling,
        "plain_weights": args.plain_weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--flash-attention", action="store_true")
    parser.add_argument("--no-sampling", action="store_true")
    parser.add_argument("--plain-weights", action="store_true", help="no repacked weights, no AMX")
    parser.add_argument("--system-info", action="store_true", help="first print how llama.cpp was built")
    args = parser.parse_args()
    if args.system_info:
        print(json.dumps({"engine": version(), "system_info": system_info()}), flush=True)
    for path in args.models:
        for test in args.tests:
            print(json.dumps(run(path, test, args)), flush=True)


if __name__ == "__main__":
    main()
