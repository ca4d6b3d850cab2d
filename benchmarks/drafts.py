"""Tokens per decode step of a single greedy stream: what drafts bring, whatever else the machine does.

    python -m benchmarks.drafts MODEL.gguf [--without-table]

Answers of 160 tokens to the `chat` and `prose` prompts of `benchmarks/speed.py`, and to more questions and texts. No
bigram table was made from any of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from speed import prompts

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished
from atlas_jax.engine.offline import ask
from atlas_jax.engine.runner import bigram_table
from atlas_jax.engine.speed import greedy
from atlas_jax.kernels.speculative_drafter import NONE

QUESTIONS = (
    "Give me a recipe for vegetable soup with exact quantities.",
    "Why is the sky blue?",
    "Write a polite email to my landlord asking him to repair the heating.",
    "What are the main differences between Python lists and tuples?",
    "Summarise the plot of Romeo and Juliet.",
    "Give me a packing list for a week of hiking in the mountains.",
    "How do I calm down before an exam?",
    "Write a JavaScript function that checks whether a string is a palindrome and explain it.",
    "Who was Marie Curie and what did she discover?",
    "Compare renting and buying a home.",
    "Write a poem about autumn rain.",
    "Explain the difference between a virus and a bacterium.",
    "How does a bill become a law in the United States?",
    "Plan a three day trip to Lisbon for a family with two children.",
    "Tell me a joke and explain why it is funny.",
    "What is compound interest? Give an example with numbers.",
    "Describe how to change a flat tyre step by step.",
    "Write SQL queries that create a table of customers and find those from Berlin.",
    "What should a small business include in its marketing plan?",
    "Translate 'Good morning, how are you?' into French, Spanish and German.",
)
"""Ordinary questions."""
TEXTS = (
    (
        "The old harbour had been quiet since the fishing boats left. Every morning Anna walked along the "
        "quay, past the nets that nobody mended any more, and counted the gulls on the roof of the customs "
        "house. Her grandfather used to say that"
    ),
    (
        "Photosynthesis is the process by which green plants and certain other organisms transform light "
        "energy into chemical energy. During photosynthesis in green plants, light energy is captured and "
        "used to convert water, carbon dioxide, and minerals into oxygen"
    ),
    (
        "The committee met on Tuesday to discuss the new bridge. Councillor Harris said the costs had "
        "doubled since the first estimate and that the money would be better spent on schools. Several "
        "residents disagreed, and"
    ),
    (
        "It was in the spring of 1848 that my father decided to sell the farm. We had been there for three "
        "generations, and I remember the look on my mother's face when he told us at supper. \"There is no "
        'future here," he said, and'
    ),
    (
        "A compiler translates source code into machine code. The first phase is lexical analysis, in which "
        "the text of the program is divided into tokens. The second phase is parsing. The parser"
    ),
    (
        "The Roman Empire reached its greatest extent under Trajan. Its roads, aqueducts and laws shaped "
        "Europe for centuries. Yet by the third century the empire faced"
    ),
)
"""To be continued."""
_ANSWER = 160


def tokens_per_step(engine: Engine, asked: Sequence[Sequence[int]]) -> float:
    """Of all answers together. Every step draws one token and those of the drafts that were right."""
    drawn = accepted = 0
    for prompt in asked:
        end = ask(engine, [greedy(prompt, _ANSWER)])[0][-1]
        assert isinstance(end, Finished)
        drawn += end.completion_tokens
        accepted += end.accepted_tokens
    return drawn / (drawn - accepted)


def unknown(cache: Path, fingerprint: str, vocab: int) -> np.ndarray:
    """A bigram table of a model that nobody has made one for."""
    return np.full((vocab,), NONE, np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--without-table", action="store_true", help="drafts from the text itself alone")
    args = parser.parse_args()
    with mock.patch.object(bigram_table, "find", unknown if args.without_table else bigram_table.find):
        engine = Engine.open(model_path=args.model, memory_enabled=False, max_concurrent=1, max_context=1024)
    sets = {
        "chat": prompts(engine, "chat", 1),
        "prose": prompts(engine, "prose", 1),
        "other questions": [engine.render_chat([{"role": "user", "content": text}]) for text in QUESTIONS],
        "other texts": [engine.tokenizer.encode(text, add_special=True, parse_special=False) for text in TEXTS],
    }
    for name, asked in sets.items():
        print(f"{name}: {tokens_per_step(engine, asked):.3f} tokens per step", flush=True)
    engine.close(timeout=10)


if __name__ == "__main__":
    main()
