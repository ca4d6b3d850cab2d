"""Facts asked for long after they have left the window, in the words they were stated in and in five other wordings.

A context is one, five or twenty facts of the same form (each the others' distractor) between sentences of a real text,
followed by the tokens of a distance of that text. It is read once into a session, then every fact is asked for in every
wording without teaching the session. Answers are greedy; a fact counts if all its digits are right, a digit if it is right
in its place.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.haystack import Sentences, haystack, joined
from atlas_jax.evaluation.measures import Item, Label, Result, Setup, Task, Value
from atlas_jax.evaluation.tables import Table, cells, only, share

DIGITS = 5
FACTS = 5
_SEED = 41
PLACES = (
    "Lisbon archive", "north tower", "glass pavilion", "harbour office", "copper mine", "old observatory", "river depot",
    "museum vault", "garden shed", "mountain station", "print shop", "salt cellar", "clock room", "paper mill",
    "lighthouse store", "opera cloakroom", "granary", "signal cabin", "boat house", "chapel crypt", "seed bank",
    "weather hut", "tram depot", "map library", "wine cellar", "foundry", "rope walk", "ice house", "bell tower", "mint",
)  # fmt: skip
STATED = "The access code of the {place} is {code}."
SAME = "the same words"
OTHERS = "all other words"
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
DISTANCES = (1024, 2048, 4096, 7168)
LONG_DISTANCES = (32768, 131072)
_ANSWER = 10


@dataclass(frozen=True)
class Case:
    """One context: a text, and the facts in it.

    Attributes:
      facts: place and code.
      distance: tokens between the last of them and the question, at least.
    """

    text: str
    facts: tuple[tuple[str, str], ...]
    distance: int


def make_case(filler: str, seed: int, count: Callable[[str], int], distance: int, facts: int = FACTS) -> Case:
    """A context made of a text's sentences: facts among the first, then the tokens of the distance."""
    rng = random.Random(seed)
    sentences = Sentences(filler, rng, count)
    stated = tuple((place, code(rng)) for place in rng.sample(PLACES, facts))
    parts: list[str] = []
    for place, digits in stated:
        parts += [sentences.one(), STATED.format(place=place, code=digits)]
    return Case(joined(parts + sentences.of_tokens(distance)), stated, distance)


def code(rng: random.Random) -> str:
    """Digits nobody can know."""
    return "".join(rng.choices("0123456789", k=DIGITS))


def digits_of(answer: str) -> str:
    """The first digits of an answer, as many as a code has."""
    return re.sub(r"\D", "", answer)[:DIGITS]


def distances(setup: Setup) -> tuple[int, ...]:
    """The distances of this scale."""
    return (1024,) if setup.quick else DISTANCES + (LONG_DISTANCES if setup.long else ())


def items(setup: Setup) -> list[Item]:
    """Contexts of five facts at every distance, and of one and of twenty at one of them."""
    kinds = [(distance, FACTS) for distance in distances(setup)]
    if not setup.quick:
        kinds += [(2048, 1), (2048, 20)]
    out = []
    for draw in range(setup.seeds):
        for distance, facts in kinds:
            contexts = setup.pick(quick=2, standard=4 if facts == 20 or distance in LONG_DISTANCES else 10)
            for index in range(contexts):
                seed = _SEED + 1000 * draw + index
                case = make_case(haystack(setup, index, distance), seed, setup.count, distance, facts)
                out.append(Item(f"{facts} at {distance}, {index}", seed, case))
    return out


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Whether each fact was found in each wording, and the share of its digits."""
    case: Case = item.data
    prompt = bench.tokens(case.text)
    out = []
    with bench.session(arm, len(prompt)) as session:
        session.read(prompt)
        for wording, template in QUESTIONS.items():
            for place, wanted in case.facts:
                question = bench.tokens(template.format(place=place), begin=False)
                answer = session.ask(question, _ANSWER).text
                found = digits_of(answer)
                labels: dict[str, Label] = {"wording": wording, "distance": case.distance, "facts": len(case.facts)}
                right = sum(a == b for a, b in zip(wanted, found, strict=False)) / DIGITS
                out.append(Value("found", float(found == wanted), labels, 1.0, wanted, answer))
                out.append(Value("digits", right, labels, 1.0))
    return out


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Found facts by wording, one table for every distance and number of facts; then by distance."""
    found = only(results, "found")
    kinds = dict.fromkeys((r.value.labels["distance"], r.value.labels["facts"]) for r in found)
    out = []
    for distance, facts in sorted(kinds, key=lambda kind: (kind[1] != FACTS, kind)):
        part = only(found, "found", distance=distance, facts=facts)
        columns, rows = cells(part, arms, wordings_of, share)
        columns = (*(name for name in columns if name != OTHERS), OTHERS)
        out.append(
            Table(
                f"{'A fact' if facts == 1 else f'{facts} facts'} at {distance} tokens",
                f"Share of {max(_counts(part).values())} facts that were found, stated at least {distance} tokens before, "
                "by the wording of the question.",
                columns,
                rows,
                form=".2f",
            )
        )
    same = [r for r in found if r.value.labels["facts"] == FACTS]
    for title, which in (("The same words", SAME), ("The five other wordings together", OTHERS)):
        part = [r for r in same if which in wordings_of(r)]
        columns, rows = cells(part, arms, lambda r: [str(r.value.labels["distance"])], share)
        about = "Share of facts that were found, by the tokens between statement and question."
        out.append(Table(f"{title}, by distance", about, columns, rows, form=".2f", x="distance"))
    return out


def wordings_of(result: Result) -> list[str]:
    """The columns an answer counts for."""
    wording = str(result.value.labels["wording"])
    return [wording] if wording == SAME else [wording, OTHERS]


def _counts(results: Sequence[Result]) -> dict[tuple[str, object], int]:
    counts: dict[tuple[str, object], int] = {}
    for result in results:
        key = (result.arm, result.value.labels["wording"])
        counts[key] = counts.get(key, 0) + 1
    return counts


TASK = Task(
    name="facts",
    part="recall",
    about="Access codes of places, stated among the sentences of a text and asked for after the tokens of a distance; a code "
    "counts if all five digits are right.",
    items=items,
    run=run,
    tables=tables,
)
