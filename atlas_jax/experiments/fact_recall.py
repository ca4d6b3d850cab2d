"""Facts asked for long after they have left the window: window alone, memory, full attention.

    python -m atlas_jax.experiments.fact_recall MODEL.gguf --filler TEXT [--contexts 10] [--window 512] [--blend 1]

A context is five facts of the same form (each the others' distractor) between sentences of a real text, followed by at
least 2 000 tokens of that text. It is read once into a session; every fact is then asked for in the words it was stated in
and in five other ways, without teaching the session. Answers are greedy; a fact counts if all its digits are right, a
digit if it is right in its place. "Full attention" is a session whose window holds the whole context. A question ends
where the code begins, so blend 1, the memory wherever it has anything to say, asks the memory alone.

`benchmarks/recall_http.py` does the same through the HTTP API, with a restart between reading and asking.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atlas_jax.engine import Engine
from atlas_jax.engine.api import GenerationRequest, MemoryParams, SamplingParams, SessionKey
from atlas_jax.engine.offline import ask, text_of

DIGITS = 5
FACTS = 5
_PLACES = (
    "Lisbon archive", "north tower", "glass pavilion", "harbour office", "copper mine", "old observatory", "river depot",
    "museum vault", "garden shed", "mountain station", "print shop", "salt cellar", "clock room", "paper mill",
    "lighthouse store", "opera cloakroom", "granary", "signal cabin", "boat house", "chapel crypt", "seed bank",
    "weather hut", "tram depot", "map library", "wine cellar", "foundry", "rope walk", "ice house", "bell tower", "mint",
)  # fmt: skip
STATED = "The access code of the {place} is {code}."
SAME = "the same words"
QUESTIONS = {
    SAME: " The access code of the {place} is ",
    "to open the door": " To open the door of the {place}, one has to enter the access code ",
    "a question": " What is the access code of the {place}? It is ",
    "can be entered": " The {place} can be entered with the code ",
    "was told": " Somebody asked for the code of the {place} and was told ",
    "a label": " {place} access code: ",
}
"""Facts asked for in the words they were stated in and in five others, chosen before any was tried but the first two of
them, of which the first puts the place ten tokens before the code."""


@dataclass(frozen=True)
class Case:
    """One context: a text, and the facts in it."""

    text: str
    facts: tuple[tuple[str, str], ...]


@dataclass
class Score:
    """How many facts, and how many of their digits, were right."""

    facts: int = 0
    digits: int = 0
    asked: int = 0

    def add(self, code: str, answer: str) -> None:
        """Counts one answer."""
        found = re.sub(r"\D", "", answer)[:DIGITS]
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


def cases(filler: str, count: int, seed: int, count_tokens: Callable[[str], int]) -> list[Case]:
    """Contexts made of a text's sentences: facts among the first, then at least 2 000 tokens."""
    rng = random.Random(seed)
    sentences = [
        " ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s+", filler) if 20 < len(sentence) < 400
    ]
    out = []
    for _ in range(count):
        start = rng.randrange(len(sentences))
        stream = sentences[start:] + sentences[:start]
        facts = tuple((place, "".join(rng.choices("0123456789", k=DIGITS))) for place in rng.sample(_PLACES, FACTS))
        parts: list[str] = []
        for place, code in facts:
            parts += [stream.pop(0), STATED.format(place=place, code=code)]
        after: list[str] = []
        while count_tokens(" ".join(after)) < 2048:
            after += [stream.pop(0) for _ in range(8)]
        out.append(Case(" ".join(parts + after), facts))
    return out


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
    contexts = [cases(fillers[i % len(fillers)], 1, args.seed + i, count)[0] for i in range(args.contexts)]
    print(
        f"{len(contexts) * FACTS} facts, stated at least 2048 tokens ago; contexts of {count(contexts[0].text)} tokens"
    )
    print(table_head())
    for mode in args.modes:
        print(table_row(mode, run(engine, contexts, modes(mode))), flush=True)
    engine.close(timeout=10)


if __name__ == "__main__":
    main()
