"""Our engine against llama.cpp's golden files: greedy continuations and perplexity on the same token ids.

    python -m benchmarks.quality --model MODEL.gguf --golden tests/golden/peer/NAME [--dtype int8|float32]
        [--parts continuations perplexity] [--chunks N]

prints one JSON line per part. `agree` is the share of prompts whose first 16 tokens are the peer's (or all of them up to
its end of generation), for each variant of the peer; `perplexity` is over the golden file's ids, by its protocol.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Delta, GenerationRequest, Prompt, SamplingParams
from atlas_jax.engine.offline import ask

AGREE_ON = 16


def continuations(engine: Engine, golden: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of every prompt of the golden file, compared with each variant of the peer."""
    greedy = SamplingParams(temperature=0.0, logprobs=0)
    requests = [
        GenerationRequest(prompt=one["prompt"], max_tokens=golden["steps"], sampling=greedy, ignore_eos=True)
        for one in golden["prompts"]
    ]
    answers = [
        [info.token for e in events if isinstance(e, Delta) for info in e.tokens] for events in ask(engine, requests)
    ]
    out: dict[str, Any] = {"prompts": len(answers)}
    for variant in [name for name in ("quantised", "float32") if name in golden["prompts"][0]]:
        wanted = [one[variant]["tokens"][:AGREE_ON] for one in golden["prompts"]]
        same = [ours[: len(theirs)] == theirs for ours, theirs in zip(answers, wanted, strict=True)]
        out[f"agree_{variant}"] = sum(same) / len(same)
        out[f"disagree_{variant}"] = [index for index, agrees in enumerate(same) if not agrees]
    return out


def perplexity(engine: Engine, golden: dict[str, Any], chunks: int | None) -> dict[str, Any]:
    """Perplexity by the golden file's protocol."""
    bos = golden["protocol"]["bos"]
    first, last = golden["protocol"]["scored_positions"]
    rows = golden["ids"][:chunks]
    started = time.monotonic()
    losses = []
    for row in rows:
        prompt = ([] if bos is None else [bos]) + row
        request = GenerationRequest(prompt=prompt, max_tokens=0, prompt_logprobs=0)
        (events,) = ask(engine, [request])
        tokens = next(e for e in events if isinstance(e, Prompt)).tokens
        scored = [-(token.logprob or 0.0) for token in tokens[first : last + 1]]
        losses.append(sum(scored) / len(scored))
    ours = sum(losses) / len(losses)
    out: dict[str, Any] = {"chunks": len(rows), "nll": ours, "perplexity": math.exp(ours)}
    for variant in ("quantised", "float32"):
        theirs = sum(golden["nll"][variant][: len(rows)]) / len(rows)
        out[f"peer_{variant}"] = math.exp(theirs)
        out[f"relative_to_{variant}"] = math.exp(ours - theirs) - 1
    out["tokens_per_second"] = sum(map(len, rows)) / (time.monotonic() - started)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--golden", required=True, help="path of the golden files up to .continuations.json")
    parser.add_argument("--dtype", choices=("int8", "float32"), default="int8")
    parser.add_argument("--parts", nargs="+", default=["continuations", "perplexity"])
    parser.add_argument("--chunks", type=int, help="chunks of the perplexity text (default: all)")
    args = parser.parse_args()
    engine = Engine.open(
        model_path=args.model,
        memory_enabled=False,
        weight_dtype=args.dtype,
        kv_dtype=args.dtype,
        max_concurrent=4,
        max_context=2048,
    )
    for part in args.parts:
        golden = json.loads(Path(f"{args.golden}.{part}.json").read_text())
        result = continuations(engine, golden) if part == "continuations" else perplexity(engine, golden, args.chunks)
        print(json.dumps({"part": part, "model": golden["model"], "dtype": args.dtype, **result}), flush=True)
    engine.close(timeout=10)


if __name__ == "__main__":
    main()
