"""RULER's tasks that need no download (arXiv 2404.06654), written from their description: needles, variables, words.

A text of a given length, its question and the beginning of the answer included, is given as one chat message. The score is
the share of the wanted strings that the answer holds, whatever its capitals; where any one of them would do there is one.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.measures import Item, Label, NotPossible, Result, Setup, Task, Value
from atlas_jax.evaluation.tables import Table, cells, mean_of_items
from atlas_jax.evaluation.tasks.words import ADJECTIVES, NOUNS

_SEED = 5041
_TEMPLATE = 48
"""Tokens of a chat template, at most."""
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_ASK_NEEDLES = "What {are} the special magic {numbers} for {keys} mentioned in the text above?"
_ZETA = 2.0


@dataclass(frozen=True)
class Exercise:
    """A text with a question, how the answer begins, and the strings it must hold."""

    kind: str
    length: int
    text: str
    question: str
    opening: str
    wanted: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class _Draft:
    """An exercise for some amount of text; more amount is never fewer tokens."""

    parts: tuple[str, ...]
    separator: str
    intro: str
    question: str
    opening: str
    wanted: tuple[str, ...]


Maker = Callable[[random.Random, int], _Draft]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _keys(rng: random.Random, count: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys.setdefault(f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}")
    return list(keys)


def _among(rng: random.Random, hay: list[str], needles: Sequence[str]) -> tuple[str, ...]:
    """Needles at random places, in a random order."""
    places = sorted(rng.randrange(len(hay) + 1) for _ in needles)
    shuffled = rng.sample(list(needles), len(needles))
    for place, needle in reversed(list(zip(places, shuffled, strict=True))):
        hay.insert(place, needle)
    return tuple(hay)


def _needles(asked: int, values: int, distractors: int) -> Maker:
    """Needles in repeated noise: so many keys that are asked, so many values of each, so many further keys."""

    def make(rng: random.Random, amount: int) -> _Draft:
        keys = _keys(rng, asked + distractors)
        numbers = iter(_numbers(rng, len(keys) * values))
        held = {key: [next(numbers) for _ in range(values)] for key in keys}
        needles = [_NEEDLE.format(key=key, value=value) for key, of_key in held.items() for value in of_key]
        return _needle_draft(_among(rng, [_NOISE] * amount, needles), {key: held[key] for key in keys[:asked]})

    return make


def _needles_among_needles(rng: random.Random, amount: int) -> _Draft:
    """One key that is asked, in a haystack of other needles."""
    keys = _keys(rng, max(amount, 1))
    held = dict(zip(keys, _numbers(rng, len(keys)), strict=True))
    asked = rng.choice(keys)
    return _needle_draft(tuple(_NEEDLE.format(key=k, value=v) for k, v in held.items()), {asked: [held[asked]]})


def _needle_draft(parts: tuple[str, ...], asked: dict[str, list[str]]) -> _Draft:
    keys = list(asked)
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    many = sum(map(len, asked.values())) > 1
    are, numbers = ("are all", "numbers") if many else ("is", "number")
    question = _ASK_NEEDLES.format(are=are, numbers=numbers, keys=named)
    return _Draft(
        parts,
        "\n",
        "Some special magic numbers are hidden within the following text. Memorize them; they are asked for afterwards.",
        question,
        f"The special magic {numbers} for {named} mentioned in the text {'are' if many else 'is'}",
        tuple(value for values in asked.values() for value in values),
    )


def _variables(rng: random.Random, amount: int) -> _Draft:
    """A chain of assignments of one value through five variables, between noise."""
    hops = 4
    names: dict[str, None] = {}
    while len(names) <= hops:
        names.setdefault("".join(rng.choices(string.ascii_uppercase, k=5)))
    chain, value = list(names), rng.choice(range(10_000, 100_000))
    assigned = [f"VAR {chain[0]} = {value}"]
    assigned += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(chain)]
    hay = [_NOISE] * amount
    for place, line in zip(sorted(rng.randrange(len(hay) + 1) for _ in assigned)[::-1], assigned[::-1], strict=True):
        hay.insert(place, line)
    return _Draft(
        tuple(hay),
        "\n",
        "Memorize and follow the assignments of variables that are hidden in the following text.",
        f"Find all variables that are assigned the value {value} in the text above, directly or through other variables.",
        f"According to the assignments, {len(chain)} variables are assigned the value {value}, they are:",
        tuple(chain),
    )


def _common_words(rng: random.Random, amount: int) -> _Draft:
    """Ten words that come thirty times each among others that come three times."""
    common, often, seldom = 10, 30, 3
    pool = rng.sample(NOUNS, len(NOUNS))
    words = pool[:common] * often + pool[common : common + amount] * seldom
    # further ones, where the pool of single words is used up
    more = max(amount - (len(pool) - common), 0)
    words += [key for key in _keys(rng, more) for _ in range(seldom)]
    rng.shuffle(words)
    return _Draft(
        tuple(f"{number}. {word}" for number, word in enumerate(words, 1)),
        " ",
        "Below is a numbered list of words. Some of them appear much more often than the others. Memorize those.",
        f"What are the {common} most common words in the list above?",
        f"The top {common} words that appear most often in the list are:",
        tuple(pool[:common]),
    )


def _frequent_words(rng: random.Random, amount: int) -> _Draft:
    """Made-up words whose numbers fall off as those of a zeta distribution; the three most frequent are asked."""
    coded: dict[str, None] = {}
    while len(coded) < 500:
        coded.setdefault("".join(rng.choices(string.ascii_lowercase, k=6)))
    words = ["...", *coded]  # the most frequent says nothing
    weights = [1 / rank**_ZETA for rank in range(1, len(words) + 1)]
    total = amount * 10
    counts = [int(total * weight / sum(weights)) for weight in weights]
    counts[0] += total - sum(counts)
    drawn = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    rng.shuffle(drawn)
    wanted = words[1:4]
    return _Draft(
        tuple(drawn),
        " ",
        "Read the following coded text and keep track of how often each coded word appears.",
        "What are the three words that appear most often in the coded text above? Do not count the dots.",
        "According to the coded text, the three words that appear most often are:",
        tuple(wanted),
    )


KINDS: dict[str, tuple[Maker, int]] = {
    "single needle": (_needles(1, 1, 0), 32),
    "needle of several keys": (_needles(1, 1, 3), 32),
    "needle among needles": (_needles_among_needles, 32),
    "several values": (_needles(1, 4, 0), 64),
    "several questions": (_needles(4, 1, 0), 64),
    "variable tracking": (_variables, 48),
    "common words": (_common_words, 80),
    "frequent words": (_frequent_words, 32),
}
"""How each kind is made, and how many tokens its answer may have."""


def items(setup: Setup) -> list[Item]:
    """Exercises of every kind at 4 096 and 8 192 tokens, as far as the context goes."""
    lengths = (1536,) if setup.quick else tuple(n for n in (4096, 8192) if n <= setup.context)
    out = []
    for draw in range(setup.seeds):
        for length in lengths:
            for kind in KINDS:
                if setup.quick and kind == "common words":
                    continue  # three hundred words and their numbers are more than a short text holds
                for index in range(setup.pick(quick=1, standard=10)):
                    seed = _SEED + 1000 * draw + index
                    out.append(Item(f"{kind} at {length}, {index}", seed, exercise(setup, kind, length, seed)))
    return out


def exercise(setup: Setup, kind: str, length: int, seed: int) -> Exercise:
    """The exercise with as much text as fits into the length. Raises ValueError if it is too short for any."""
    make, answer = KINDS[kind]
    room = length - answer - _TEMPLATE

    def size(draft: _Draft) -> int:
        whole = f"{draft.intro}\n\n{draft.separator.join(draft.parts)}\n\n{draft.question}{draft.opening}"
        return setup.count(whole)

    def made(amount: int) -> _Draft:
        return make(random.Random(f"{kind} {seed}"), amount)

    low, high = 1, 2
    if size(made(low)) > room:
        raise ValueError(f"{kind} does not fit into {length} tokens")
    while size(made(high)) <= room:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(made(middle)) <= room else (low, middle)
    draft = made(low)
    text = f"{draft.intro}\n\n{draft.separator.join(draft.parts)}"
    return Exercise(kind, length, text, draft.question, draft.opening, draft.wanted, answer)


def score(answer: str, wanted: Sequence[str]) -> float:
    """The share of the strings that the answer holds."""
    said = answer.lower()
    return sum(one.lower() in said for one in wanted) / len(wanted)


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """The score of a greedy answer; raises NotPossible where the model's chat template leaves too little room."""
    given: Exercise = item.data
    messages = [{"role": "user", "content": f"{given.text}\n\n{given.question}"}]
    prompt = [*bench.chat_tokens(messages), *bench.tokens(given.opening, begin=False)]
    if len(prompt) + given.answer > given.length:
        raise NotPossible(f"{given.kind}: the model's template makes more than {given.length} tokens of it")
    said = bench.answer(prompt, arm, given.answer).text
    labels: dict[str, Label] = {"kind": given.kind, "length": given.length}
    return [Value("score", score(said, given.wanted), labels, 1.0, ", ".join(given.wanted), said)]


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Scores by kind, one table for each length."""
    out = []
    for length in sorted({int(result.value.labels["length"]) for result in results}):
        part = [result for result in results if result.value.labels["length"] == length]
        columns, rows = cells(part, arms, lambda r: [str(r.value.labels["kind"]), "all"], mean_of_items)
        columns = (*(name for name in columns if name != "all"), "all")
        about = "Share of the wanted strings that answers hold, mean over exercises."
        out.append(Table(f"RULER at {length} tokens", about, columns, rows, form=".2f"))
    return out


TASK = Task(
    name="ruler",
    part="recall",
    about="Needles in noise, variable tracking, common and frequent words, as RULER describes them.",
    items=items,
    run=run,
    tables=tables,
)
