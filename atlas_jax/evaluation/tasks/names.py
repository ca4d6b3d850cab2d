"""Names that are mentioned over many turns of a chat, each asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Sequence

from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.chat_facts import holds
from atlas_jax.evaluation.contexts import Conversation, Question, ask_conversation
from atlas_jax.evaluation.haystack import Sentences, haystack, joined
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.tables import Table, shares_table

_SEED = 3041
_BETWEEN = 200
NAMES = (
    "Agnes", "Bruno", "Celia", "Dmitri", "Edith", "Farid", "Greta", "Hamish", "Ingrid", "Jorge", "Kirsten", "Leopold",
    "Miriam", "Nadia", "Oscar", "Paloma", "Quentin", "Rosalind", "Stefan", "Tabitha", "Ulrich", "Violet", "Wanda", "Yusuf",
)  # fmt: skip
DOINGS = (
    ("plays the cello", "Who plays the cello?"),
    ("keeps bees on the roof", "Who keeps bees on the roof?"),
    ("drives an old fire engine", "Who drives an old fire engine?"),
    ("is learning Portuguese", "Who is learning Portuguese?"),
    ("repairs church clocks", "Who repairs church clocks?"),
    ("swims in the lake every morning", "Who swims in the lake every morning?"),
    ("sells antique maps", "Who sells antique maps?"),
    ("bakes rye bread", "Who bakes rye bread?"),
    ("has climbed Kilimanjaro", "Who has climbed Kilimanjaro?"),
    ("builds model railways", "Who builds model railways?"),
    ("translates Russian poems", "Who translates Russian poems?"),
    ("works as a lighthouse keeper", "Who works as a lighthouse keeper?"),
    ("collects wooden masks", "Who collects wooden masks?"),
    ("raises Icelandic sheep", "Who raises Icelandic sheep?"),
    ("won the chess tournament", "Who won the chess tournament?"),
    ("grows giant pumpkins", "Who grows giant pumpkins?"),
)


def items(setup: Setup) -> list[Item]:
    """Conversations of 5 and of 16 turns, a person in each."""
    out = []
    for draw in range(setup.seeds):
        for turns in (5,) if setup.quick else (5, 16):
            for index in range(setup.pick(quick=1, standard=5)):
                seed = _SEED + 1000 * draw + index
                out.append(Item(f"{turns} turns, {index}", seed, _conversation(setup, seed, index, turns)))
    return out


def _conversation(setup: Setup, seed: int, index: int, turns: int) -> Conversation:
    rng = random.Random(seed)
    sentences = Sentences(haystack(setup, index, turns * _BETWEEN), rng, setup.count)
    people = list(zip(rng.sample(NAMES, turns), rng.sample(DOINGS, turns), strict=True))
    said = [
        f"My friend {name} {doing}. And this is what I am reading: {joined(sentences.of_tokens(_BETWEEN))}"
        for name, (doing, _) in people
    ]
    said.append(f"I went on reading: {joined(sentences.of_tokens(3 * _BETWEEN))}")
    questions = [Question(asked, (name,), {"turns": turns}) for name, (_, asked) in people]
    return Conversation(tuple(said), tuple(questions))


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Whether the answer names the right one of the friends, and no other before."""
    names = {name for question in item.data.questions for name in question.wanted}

    def right(answer: str, question: Question) -> bool:
        return first_of(answer, names) == question.wanted[0]

    return ask_conversation(bench, arm, item.data, right, 32)


def first_of(answer: str, names: set[str]) -> str | None:
    """The name that an answer gives first."""
    said = answer.lower()
    places = {said.find(name.lower()): name for name in names if holds(answer, (name,))}
    return places[min(places)] if places else None


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Found names by the number of turns."""
    about = "Share of questions answered with the right name, by the turns of the conversation."
    return [shares_table(results, arms, "Names over many turns", about, "turns", together="all")]


TASK = Task(
    name="names",
    part="recall",
    about="A chat in which every turn says what a friend does, and goes on with other text; at its end each is asked for.",
    items=items,
    run=run,
    tables=tables,
)
