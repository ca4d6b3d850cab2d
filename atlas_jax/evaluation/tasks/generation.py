"""Harm to what is written: does a greedy continuation repeat itself more than with the window alone?"""

from __future__ import annotations

from collections.abc import Sequence

from atlas_jax.evaluation.arms import WINDOW, Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.statistics import mean
from atlas_jax.evaluation.tables import Table, cells, mean_of_items, only
from atlas_jax.evaluation.tasks.loss import Reading

_WRITTEN = 192
_NGRAM = 4


def items(setup: Setup) -> list[Item]:
    """Documents, of which the beginning is read."""
    documents = list(setup.texts.group("documents").items())
    tokens = 1024 if setup.quick else 3072
    chosen = documents[: setup.pick(quick=2, standard=len(documents))]
    return [Item(name, 0, Reading(text, tokens)) for name, text in chosen if setup.count(text) > tokens]


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Shares of repeated 4-grams and of distinct tokens and pairs, and of 4-grams copied from the text."""
    prompt = bench.tokens(item.data.text)[: item.data.tokens]
    answer = bench.answer(prompt, arm, _WRITTEN)
    written = list(answer.tokens)
    return [
        Value("repeated 4-grams", 1 - distinct(written, _NGRAM), weight=len(written), answer=answer.text),
        Value("4-grams of the text", copied(written, prompt, _NGRAM), weight=len(written)),
        Value("distinct tokens", distinct(written, 1), weight=len(written)),
        Value("distinct pairs", distinct(written, 2), weight=len(written)),
    ]


def ngrams(tokens: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """All runs of `size` tokens."""
    return [tuple(tokens[index : index + size]) for index in range(len(tokens) - size + 1)]


def distinct(tokens: Sequence[int], size: int) -> float:
    """The share of runs that are the first of their kind; 1 where there are none."""
    runs = ngrams(tokens, size)
    return len(set(runs)) / len(runs) if runs else 1.0


def copied(tokens: Sequence[int], source: Sequence[int], size: int) -> float:
    """The share of runs that are in the source; 0 where there are none."""
    runs, there = ngrams(tokens, size), set(ngrams(source, size))
    return sum(run in there for run in runs) / len(runs) if runs else 0.0


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """The shares, and how much more is repeated than with the window alone."""
    columns, rows = cells(results, arms, lambda r: [r.value.measure], mean_of_items)
    repeated = only(results, "repeated 4-grams")
    own = {arm: {r.item: r.value.value for r in repeated if r.arm == arm} for arm in arms}
    difference = "repeated 4-grams, against the window"
    full = {arm: dict(row) for arm, row in rows.items()}
    for arm in arms:
        both = sorted(own[arm].keys() & own.get(WINDOW, {}).keys())
        full[arm][difference] = mean([own[arm][name] - own[WINDOW][name] for name in both])
    about = f"Shares of {_WRITTEN} tokens written greedily, mean over documents."
    return [Table("Greedy continuations", about, (*columns, difference), full)]


TASK = Task(
    name="generation",
    part="harm",
    about="Documents are read and gone on with greedily: how much of it repeats itself, and how much the text.",
    items=items,
    run=run,
    tables=tables,
)
