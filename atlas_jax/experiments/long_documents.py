"""What the memory is worth on long documents: loss past the window with the window alone, with memory, with full attention.

    python -m atlas_jax.experiments.long_documents MODEL.gguf --texts FOLDER [--tokens 4608] [--window 512]

reads each text three times with the same engine and prints a Markdown table. The loss is the mean over the tokens from
`window` on; "gap closed" is (window − memory) / (window − full).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from atlas_jax.engine import Engine
from atlas_jax.engine.api import GenerationRequest, MemoryParams, Prompt
from atlas_jax.engine.offline import ask


@dataclass(frozen=True)
class Losses:
    """Mean nats of one document past the window."""

    name: str
    tokens: int
    window: float
    memory: float
    full: float

    @property
    def gap_closed(self) -> float:
        """Share of what the window costs that the memory wins back."""
        return (self.window - self.memory) / (self.window - self.full)


def loss(engine: Engine, tokens: list[int], memory: MemoryParams | None, start: int) -> float:
    """Mean nats of the tokens from position `start` on."""
    (events,) = ask(engine, [GenerationRequest(prompt=tokens, max_tokens=0, prompt_logprobs=0, memory=memory)])
    scored = next(event for event in events if isinstance(event, Prompt)).tokens
    return statistics.fmean(-(token.logprob or 0.0) for token in scored[start:])


def measure(engine: Engine, name: str, tokens: list[int], memory: MemoryParams) -> Losses:
    """The three losses of one document."""
    window = MemoryParams(window_size=memory.window_size, read=False)
    start = memory.window_size
    return Losses(
        name=name,
        tokens=len(tokens),
        window=loss(engine, tokens, window, start),
        memory=loss(engine, tokens, memory, start),
        full=loss(engine, tokens, None, start),
    )


def table(rows: list[Losses]) -> str:
    """The results as Markdown, the mean last."""
    mean = Losses(
        name="**mean**",
        tokens=sum(row.tokens for row in rows) // len(rows),
        window=statistics.fmean(row.window for row in rows),
        memory=statistics.fmean(row.memory for row in rows),
        full=statistics.fmean(row.full for row in rows),
    )
    lines = ["| document | tokens | window | memory | full | gap closed |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r.name} | {r.tokens} | {r.window:.4f} | {r.memory:.4f} | {r.full:.4f} | {r.gap_closed:.2f} |"
        for r in [*rows, mean]
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--texts", type=Path, required=True, help="folder of .txt files (atlas_jax/evaluation/corpora.py)"
    )
    parser.add_argument("--tokens", type=int, default=4608, help="tokens read of each text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--adapter", type=Path, help="adapter of the memory (default: the engine finds one)")
    parser.add_argument("--optimizer", choices=("exact", "gradient", "muon"), default="exact")
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--layers", type=int, default=1)
    args = parser.parse_args()
    engine = Engine.open(
        model_path=args.model,
        adapter_path=args.adapter,
        max_concurrent=2,
        max_context=args.tokens,
        max_window=args.window,
    )
    memory = MemoryParams(
        window_size=args.window,
        use_muon={"exact": None, "gradient": False, "muon": True}[args.optimizer],
        polynomial_degree=args.degree,
        memory_layers=args.layers,
    )
    rows = []
    for path in sorted(args.texts.glob("*.txt")):
        tokens = engine.tokenizer.encode(path.read_text("utf-8"), add_special=True, parse_special=False)[: args.tokens]
        if len(tokens) <= args.window:
            print(f"{path.stem}: too short, left out")
            continue
        rows.append(measure(engine, path.stem, tokens, memory))
        row = rows[-1]
        print(f"{row.name}: {row.window:.4f} {row.memory:.4f} {row.full:.4f} ({row.gap_closed:.2f})", flush=True)
    print(table(rows))
    engine.close(timeout=10)


if __name__ == "__main__":
    main()
