"""What a token costs in a session that has read 2 000, 32 000, 128 000 tokens: time to read, time to write, memory in use.

    python -m benchmarks.endless MODEL.gguf [--lengths 2048 32768 131072] [--rounds 5] [--output docs/benchmarks/endless.md]

One session with a window of 512 reads prose in requests of 4 096 tokens. At each length, every round reads 512 more tokens
and writes 64 more; the table has medians. The ratio is to the first length.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from importlib import resources
from pathlib import Path

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished, GenerationRequest, MemoryParams, SamplingParams, SessionKey
from atlas_jax.engine.offline import ask

_PIECE = 4096
_READ, _WRITE = 512, 64
_PAGE_BYTES = resource.getpagesize()


class Reader:
    """One session that goes on and on."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        text = (resources.files("atlas_jax.recall") / "texts" / "prose.txt").read_text(encoding="utf-8")
        self._tokens = engine.tokenizer.encode(text, add_special=False, parse_special=False)
        self._at = 0
        self.length = 0

    def go(self, read: int, write: int) -> Finished:
        """Reads so many tokens more and writes so many."""
        # a step that shares no factor with the text's length: no request begins like an earlier one
        start = self._at = (self._at + 7919) % len(self._tokens)
        prompt = (self._tokens[start:] + self._tokens * (read // len(self._tokens) + 1))[:read]
        memory = MemoryParams(session=SessionKey("bench", "endless"), window_size=512)
        sampling = SamplingParams(temperature=0.0)
        asked = GenerationRequest(prompt=prompt, max_tokens=write, sampling=sampling, ignore_eos=True, memory=memory)
        end = ask(self.engine, [asked])[0][-1]
        assert isinstance(end, Finished)
        assert end.cached_tokens == 0, "the session took the text for a repetition"
        self.length += read + write
        return end


def resident() -> float:
    """Memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    # without drafts: how many are right depends on the text, and would hide what a step costs
    engine = Engine.open(model_path=args.model, max_concurrent=2, speculate=False)
    engine.warm_up()
    reader = Reader(engine)
    lines = [
        "| tokens read | ms to read a token | ms to write a token | both, to the first | resident MiB |",
        "|---|---|---|---|---|",
    ]
    first: tuple[float, float] | None = None
    for length in args.lengths:
        while reader.length < length:
            reader.go(min(_PIECE, max(1, length - reader.length)), 1)
        ends = [reader.go(_READ, _WRITE) for _ in range(args.rounds)]
        read = 1e3 * statistics.median(end.prompt_seconds for end in ends) / _READ
        write = 1e3 * statistics.median(end.decode_seconds for end in ends) / (_WRITE - 1)
        first = first or (read, write)
        ratios = f"{read / first[0]:.2f}, {write / first[1]:.2f}"
        lines.append(f"| {length} | {read:.2f} | {write:.1f} | {ratios} | {resident():.0f} |")
        print(lines[-1], flush=True)
    engine.close(timeout=30)
    table = "\n".join(lines)
    print(table)
    if args.output:
        args.output.write_text(f"{args.model.stem}, one session with a window of 512\n\n{table}\n")


if __name__ == "__main__":
    main()
