"""A list of keys and values, one of which is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.contexts import Context, Question, ask_context
from atlas_jax.evaluation.haystack import Sentences, haystack, joined
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.tables import Table, shares_table
from atlas_jax.evaluation.tasks.facts import digits_of

_SEED = 2041
_ASKED = 8
KEYS = (
    "anchor", "basket", "candle", "drum", "easel", "feather", "goblet", "hammer", "inkwell", "jigsaw", "kettle", "ladder",
    "mirror", "needle", "oar", "pillow", "quilt", "ribbon", "saddle", "teapot", "umbrella", "violin", "wagon", "xylophone",
    "yarn", "zipper", "acorn", "bucket", "compass", "domino", "envelope", "flute", "garland", "hinge", "icicle", "jug",
    "knapsack", "lantern", "marble", "notebook", "orchid", "paddle", "quiver", "rocket", "scissors", "trumpet", "urn",
    "vase", "whistle", "yoke",
)  # fmt: skip


def items(setup: Setup) -> list[Item]:
    """Lists of 20, 35 and 50 keys after the sentences of a text, and before a distance of it."""
    sizes = (20,) if setup.quick else (20, 35, 50)
    distances = (1024,) if setup.quick else (1024, 4096)
    out = []
    for draw in range(setup.seeds):
        for size in sizes:
            for distance in distances:
                for index in range(setup.pick(quick=1, standard=5)):
                    seed = _SEED + 1000 * draw + index
                    out.append(
                        Item(f"{size} at {distance}, {index}", seed, _context(setup, seed, index, size, distance))
                    )
    return out


def _context(setup: Setup, seed: int, index: int, size: int, distance: int) -> Context:
    rng = random.Random(seed)
    sentences = Sentences(haystack(setup, index, distance), rng, setup.count)
    values = {key: "".join(rng.choices("0123456789", k=5)) for key in rng.sample(KEYS, size)}
    listed = "\n".join(f"- {key}: {value}" for key, value in values.items())
    before = joined([sentences.one() for _ in range(3)])
    text = f"{before}\n\nThe numbers of the things:\n{listed}\n\n{joined(sentences.of_tokens(distance))}\n\n"
    labels = {"keys": size, "distance": distance}
    asked = rng.sample(sorted(values), _ASKED)
    return Context(
        text, tuple(Question(f"The number of the thing:\n- {key}:", (values[key],), labels) for key in asked)
    )


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Whether the value of each key that is asked for was found."""
    return ask_context(bench, arm, item.data, lambda answer, question: digits_of(answer) == question.wanted[0], 10)


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Found values by the length of the list and the distance."""
    about = "Share of values that were found, by the keys of the list and the tokens since."
    return [shares_table(results, arms, "Key–value lists", about, "keys", "distance", together="all")]


TASK = Task(
    name="lists",
    part="recall",
    about="A list of 20 to 50 things with a number each; some are asked for in the form of the list.",
    items=items,
    run=run,
    tables=tables,
)
