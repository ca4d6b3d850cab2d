"""Facts that are stated again with another value: only the newest counts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.contexts import Context, Question, ask_context
from atlas_jax.evaluation.haystack import Sentences, haystack, joined
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.tables import Table, cells, only, share
from atlas_jax.evaluation.tasks.facts import PLACES, QUESTIONS, SAME, STATED, code, digits_of

_SEED = 1041
_FACTS, _CHANGED = 5, 3
_BETWEEN = 400
_WORDINGS = (SAME, "a question")


def items(setup: Setup) -> list[Item]:
    """Contexts in which three of five codes are stated twice."""
    distances = (1024,) if setup.quick else (2048, 7168) + ((32768,) if setup.long else ())
    out = []
    for draw in range(setup.seeds):
        for distance in distances:
            for index in range(setup.pick(quick=2, standard=10)):
                seed = _SEED + 1000 * draw + index
                out.append(Item(f"at {distance}, {index}", seed, _context(setup, seed, index, distance)))
    return out


def _context(setup: Setup, seed: int, index: int, distance: int) -> Context:
    rng = random.Random(seed)
    sentences = Sentences(haystack(setup, index, distance + _BETWEEN), rng, setup.count)
    places = rng.sample(PLACES, _FACTS)
    first = {place: code(rng) for place in places}
    second = {place: code(rng) for place in rng.sample(places, _CHANGED)}
    parts: list[str] = []
    for stated in (first, second):
        for place, digits in stated.items():
            parts += [sentences.one(), STATED.format(place=place, code=digits)]
        parts += sentences.of_tokens(_BETWEEN if stated is first else distance)
    questions = [
        Question(
            QUESTIONS[wording].format(place=place),
            (second.get(place, first[place]),),
            {"wording": wording, "distance": distance, "stated": "twice" if place in second else "once"},
            (first[place],) if place in second else (),
        )
        for wording in _WORDINGS
        for place in places
    ]
    return Context(joined(parts), tuple(questions))


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Whether the newest code was found, and whether an overwritten one was given instead."""
    values = ask_context(bench, arm, item.data, lambda answer, question: digits_of(answer) == question.wanted[0], 10)
    old = [
        dataclasses.replace(value, measure="old", value=float(digits_of(value.answer or "") in question.wrong))
        for value, question in zip(values, item.data.questions, strict=True)
        if question.wrong
    ]
    return values + old


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """The newest code, the old one instead, and codes beside them that were stated once."""

    def columns_of(result: Result) -> list[str]:
        labels = result.value.labels
        what = "stated once" if labels["stated"] == "once" else "newest" if result.value.measure == "found" else "old"
        return [f"{what}, {labels['wording']}, {labels['distance']}"]

    columns, rows = cells(results, arms, columns_of, share)
    about = (
        "Share of answers that were the newest code, the overwritten one, and of those beside them that were stated once; by "
        "wording and distance."
    )
    assert only(results, "found")
    return [Table("Overwritten facts", about, columns, rows, form=".2f")]


TASK = Task(
    name="overwritten",
    part="recall",
    about="Three of five codes are stated again with another value; right is the newest alone.",
    items=items,
    run=run,
    tables=tables,
)
