"""Harm to what needs no memory: small exercises asked after long reading that has nothing to do with them.

Each is a choice between two continuations of the same length in words, the likelier of which is taken; both orders come
equally often, so that half are right by chance. Series and analogies come with examples, agreement is plain language.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atlas_jax.evaluation.arms import WINDOW, Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.haystack import Sentences, haystack, joined
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.statistics import Estimate, mean
from atlas_jax.evaluation.tables import Table, by, cells, only, share

_SEED = 7041
_READ = 3072
_OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("fast", "slow"), ("old", "new"), ("early", "late"), ("rich", "poor"),
    ("open", "closed"), ("left", "right"), ("wet", "dry"), ("hard", "soft"), ("light", "dark"), ("happy", "sad"),
    ("strong", "weak"), ("full", "empty"), ("high", "low"), ("near", "far"), ("long", "short"), ("thick", "thin"),
    ("first", "last"), ("day", "night"), ("buy", "sell"), ("win", "lose"), ("push", "pull"), ("begin", "end"),
    ("love", "hate"), ("true", "false"), ("loud", "quiet"), ("clean", "dirty"), ("young", "old"),
)  # fmt: skip
_SUBJECTS = (
    ("key", "keys"), ("author", "authors"), ("picture", "pictures"), ("teacher", "teachers"), ("letter", "letters"),
    ("window", "windows"), ("report", "reports"), ("farmer", "farmers"), ("song", "songs"), ("road", "roads"),
    ("student", "students"), ("box", "boxes"),
)  # fmt: skip
_PLACES = (
    ("near the cabinet", "near the cabinets"), ("next to the door", "next to the doors"),
    ("behind the house", "behind the houses"), ("from the village", "from the villages"), ("with the lamp", "with the lamps"),
    ("beside the table", "beside the tables"),
)  # fmt: skip
_VERBS = (("is", "are"), ("was", "were"), ("has", "have"))


@dataclass(frozen=True)
class Choice:
    """A beginning, how it goes on, and how it does not."""

    kind: str
    text: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Exercises:
    """Choices after a text that is read first."""

    text: str
    choices: tuple[Choice, ...]


def _agreement(rng: random.Random) -> Choice:
    """The verb follows its subject's number, not that of the nearer noun."""
    number, subject, place, verb = rng.randrange(2), rng.choice(_SUBJECTS), rng.choice(_PLACES), rng.choice(_VERBS)
    return Choice("agreement", f"The {subject[number]} {place[1 - number]}", f" {verb[number]}", f" {verb[1 - number]}")


def _series(rng: random.Random) -> Choice:
    """Numbers at equal distances go on at that distance."""

    def row(start: int, step: int) -> list[int]:
        return [start + step * index for index in range(5)]

    rows = [row(rng.randrange(1, 30), rng.randrange(2, 10)) for _ in range(3)]
    *shown, last = rows[-1]
    examples = "\n".join(", ".join(map(str, one)) for one in rows[:-1])
    wrong = last + rng.choice((-2, -1, 1, 2))
    return Choice("series", f"\n\n{examples}\n{', '.join(map(str, shown))},", f" {last}", f" {wrong}")


def _analogy(rng: random.Random) -> Choice:
    """Words and their opposites; the wrong answer is the opposite of another of them."""
    pairs = rng.sample(_OPPOSITES, 5)
    *examples, (asked, right) = pairs
    shown = "\n".join(f"{word} : {opposite}" for word, opposite in examples)
    return Choice("opposites", f"\n\n{shown}\n{asked} :", f" {right}", f" {examples[rng.randrange(4)][1]}")


_KINDS: tuple[Callable[[random.Random], Choice], ...] = (_agreement, _series, _analogy)


def items(setup: Setup) -> list[Item]:
    """Exercises of every kind after a text."""
    out = []
    each = setup.pick(quick=4, standard=20)
    for draw in range(setup.seeds):
        for index in range(setup.pick(quick=1, standard=5)):
            seed = _SEED + 1000 * draw + index
            rng = random.Random(seed)
            read = 1024 if setup.quick else _READ
            text = joined(Sentences(haystack(setup, index, read), rng, setup.count).of_tokens(read))
            choices = tuple(make(rng) for make in _KINDS for _ in range(each))
            out.append(Item(f"set {index}", seed, Exercises(text, choices)))
    return out


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Whether the right continuation of each is the likelier one."""
    prompt = bench.tokens(item.data.text)
    out = []
    with bench.session(arm, len(prompt)) as session:
        session.read(prompt)
        for choice in item.data.choices:
            question = bench.tokens(f"\n\n{choice.text.lstrip()}", begin=False)
            right, wrong = (
                session.score(question, bench.tokens(text, begin=False)) for text in (choice.right, choice.wrong)
            )
            labels = {"kind": choice.kind}
            out.append(Value("found", float(right < wrong), labels, 1.0, choice.right))
            out.append(Value("margin", wrong - right, labels))
    return out


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Shares that are right, and the difference to the window alone over the same exercises."""
    columns, rows = cells(only(results, "found"), arms, lambda r: [str(r.value.labels["kind"]), "all"], share)
    columns = (
        *(name for name in columns if name != "all"),
        "all",
        "all, against the window",
        "margin in nats",
        "margin, against the window",
    )
    found, margins = (
        {arm: _means([r for r in only(results, measure) if r.arm == arm]) for arm in arms}
        for measure in ("found", "margin")
    )
    full: dict[str, dict[str, Estimate]] = {arm: dict(row) for arm, row in rows.items()}
    for arm in arms:
        full[arm]["margin in nats"] = mean(list(margins[arm].values()))
        for name, own in (("all", found), ("margin", margins)):
            both = sorted(own[arm].keys() & own.get(WINDOW, {}).keys())
            full[arm][f"{name}, against the window"] = mean([own[arm][key] - own[WINDOW][key] for key in both])
    about = (
        "Share of exercises whose right continuation is the likelier of two, half are right by chance; and by how many nats "
        "it is likelier."
    )
    return [Table("Exercises that need no memory", about, columns, full)]


def _means(results: Sequence[Result]) -> dict[tuple[str, int], float]:
    groups = by(results, lambda r: (r.item, r.seed))
    return {key: sum(r.value.value for r in group) / len(group) for key, group in groups.items()}  # type: ignore[misc]


TASK = Task(
    name="reasoning",
    part="harm",
    about="Agreement of verb and subject, series of numbers and opposites, after a text that has nothing to do with them.",
    items=items,
    run=run,
    tables=tables,
)
