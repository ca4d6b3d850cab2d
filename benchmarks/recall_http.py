"""Facts asked for through the HTTP API after they left the window and the server was restarted.

    python -m benchmarks.recall_http MODEL.gguf --filler TEXT ... [--contexts 10] [--blend 1]

The contexts and questions of `atlas_jax.experiments.fact_recall`: a server reads every context into a session of its own,
is ended with SIGTERM, started again, and asked. Prints the same table, and how long the stop and the start took.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from atlas_jax.evaluation.tasks.facts import DIGITS, QUESTIONS, make_case
from atlas_jax.experiments.fact_recall import DISTANCE, Score, table_head, table_row
from atlas_jax.gguf import GGUFFile, Tokenizer
from benchmarks.server_process import Server


def complete(server: Server, prompt: str, session: str, max_tokens: int, **atlas: object) -> str:
    """A greedy completion of a session."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "atlas": {"session_id": session, **atlas},
    }
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--filler", type=Path, nargs="+", required=True)
    parser.add_argument("--contexts", type=int, default=10, help="contexts of five facts each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blend", type=float, default=1.0)
    args = parser.parse_args()
    with GGUFFile.open(args.model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special=False, parse_special=False))

    fillers = [path.read_text("utf-8") for path in args.filler]
    contexts = [make_case(fillers[i % len(fillers)], args.seed + i, count, DISTANCE) for i in range(args.contexts)]
    scores = {wording: Score() for wording in QUESTIONS}
    with tempfile.TemporaryDirectory() as name:
        server = Server(args.model, Path(name))
        for index, case in enumerate(contexts):
            complete(server, case.text, f"context-{index}", 1)
        stopped = server.end()
        server = Server(args.model, Path(name))
        for index, case in enumerate(contexts):
            for wording, template in QUESTIONS.items():
                for place, code in case.facts:
                    question = template.format(place=place)
                    answer = complete(
                        server, question, f"context-{index}", DIGITS + 5, write=False, blend_ratio=args.blend
                    )
                    scores[wording].add(code, answer)
        print(f"stopped in {stopped:.1f} s, started again in {server.seconds:.1f} s")
        server.end()
    print(table_head())
    print(table_row("memory, over HTTP, after a restart", scores))


if __name__ == "__main__":
    main()
