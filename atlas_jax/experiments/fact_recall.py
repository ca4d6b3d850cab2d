"""Facts asked for long after they have left the window: window alone, memory, full attention.

    python -m atlas_jax.experiments.fact_recall MODEL.gguf --filler TEXT [--contexts 10] [--window 512] [--blend 1]

A context is five facts of the same form (each the others' distractor) between sentences of a real text, followed by at
least 2 000 tokens of that text. It is read once into a session; every fact is then asked for in the words it was stated in
and in five other ways, without teaching the session. Answers are greedy; a fact counts if all its digits are right, a
digit if it is right in its place. "Full attention" is a session whose window holds the whole context. A question ends
where the code begins, so blend 1, the memory wherever it has anything to say, asks the memory alone.

`atlas-jax eval --tasks facts` measures the same kind of context at several distances, in haystacks of its own.
`benchmarks/recall_http.py` does the same through the HTTP API, with a restart between reading and asking.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atlas_jax.engine import Engine
from atlas_jax.engine.api import GenerationRequest, MemoryParams, SamplingParams, SessionKey
from atlas_jax.engine.offline import ask, text_of
from atlas_jax.evaluation.tasks.facts import DIGITS, FACTS, QUESTIONS, SAME, Case, digits_of, make_case

DISTANCE = 2048


@dataclass
class Score:
    """How many facts, and how many of their digits, were right."""

    facts: int = 0
    digits: int = 0
    asked: int = 0

    def add(self, code: str, answer: str) -> None:
        """Counts one answer."""
        found = digits_of(answer)
        self.asked += 1
        self.facts += found == code
        self.digits += sum(a == b for a, b in zip(code, found, strict=False))

    def __add__(self, other: Score) -> Score:
        return Score(self.facts + other.facts, self.digits + other.digits, self.asked + other.asked)

    def __str__(self) -> str:
        return f"{self.facts / self.asked:.2f}, {self.digits / (self.asked * DIGITS):.2f}"


def table_head() -> str:
    """The head of a table of `table_row`s."""
    return f"| facts, digits | {' | '.join(QUESTIONS)} | all other words |\n|---|{'---|' * (len(QUESTIONS) + 1)}"


def table_row(name: str, scores: dict[str, Score]) -> str:
    """Scores by wording, and of all wordings but the first together."""
    others = sum((score for wording, score in scores.items() if wording != SAME), Score())
    return f"| {name} | {' | '.join(str(scores[wording]) for wording in QUESTIONS)} | {others} |"


def run(
    engine: Engine, contexts: Sequence[Case], params: Callable[[SessionKey, bool], MemoryParams]
) -> dict[str, Score]:
    """Reads every context into a session and asks for its facts in every wording."""
    scores = {wording: Score() for wording in QUESTIONS}
    greedy = SamplingParams(temperature=0.0)
    for index, case in enumerate(contexts):
        key = SessionKey("recall", f"context-{index}")
        prompt = engine.tokenizer.encode(case.text, add_special=True, parse_special=False)
        ask(engine, [GenerationRequest(prompt=prompt, max_tokens=0, memory=params(key, True))])
        for wording, template in QUESTIONS.items():
            for place, code in case.facts:
                question = engine.tokenizer.encode(template.format(place=place), add_special=False, parse_special=False)
                request = GenerationRequest(
                    prompt=question, max_tokens=10, sampling=greedy, memory=params(key, False), ignore_eos=True
                )
                (events,) = ask(engine, [request])
                scores[wording].add(code, text_of(events))
        engine.sessions.reset(key.owner, key.session_id)
    return scores


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--contexts", type=int, default=10, help="contexts of five facts each")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--filler", type=Path, nargs="+", required=True, help="texts the facts are hidden in, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blend", type=float, default=1.0)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--modes", nargs="+", default=["window", "memory", "full"])
    args = parser.parse_args()
    engine = Engine.open(
        model_path=args.model, adapter_path=args.adapter, max_concurrent=2, max_context=4096, max_window=4096
    )

    def modes(mode: str) -> Callable[[SessionKey, bool], MemoryParams]:
        size = 4096 if mode == "full" else args.window
        return lambda key, teach: MemoryParams(
            session=key, window_size=size, read=mode == "memory", write=teach, blend_ratio=args.blend
        )

    def count(text: str) -> int:
        return len(engine.tokenizer.encode(text, add_special=False, parse_special=False))

    fillers = [path.read_text("utf-8") for path in args.filler]
    contexts = [make_case(fillers[i % len(fillers)], args.seed + i, count, DISTANCE) for i in range(args.contexts)]
    print(
        f"{len(contexts) * FACTS} facts, stated at least {DISTANCE} tokens ago; contexts of {count(contexts[0].text)} tokens"
    )
    print(table_head())
    for mode in args.modes:
        print(table_row(mode, run(engine, contexts, modes(mode))), flush=True)
    engine.close(timeout=10)


if __name__ == "__main__":
    main()
