"""Facts asked for without any of their words: the link is something everybody knows (the idea of NoLiMa, arXiv 2502.05167).

"Yuki lives next to the Semper Opera House" answers "Which of them has been to Dresden?". A context has four such statements
about four people, so that one of four names is right by chance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.contexts import Conversation, Question, ask_conversation
from atlas_jax.evaluation.haystack import Sentences, haystack
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.tables import Table, shares_table
from atlas_jax.evaluation.tasks.names import NAMES, first_of

_SEED = 4041
_TOGETHER = 4
LINKS = (
    ("{} lives next to the Semper Opera House.", "Who has been to Dresden?"),
    ("{} works in a café below the Eiffel Tower.", "Who knows Paris well?"),
    ("{} cannot drink milk without getting a stomach ache.", "Who is lactose intolerant?"),
    ("{} has not eaten meat or fish since school.", "Who is a vegetarian?"),
    ("{} spends every weekend at the slopes with two long boards under the feet.", "Who likes skiing?"),
    ("{} plays an instrument of eighty-eight black and white keys.", "Who is a pianist?"),
    ("{} takes photographs of the Colosseum for a living.", "Who has visited Rome?"),
    ("{} needs an injection of insulin before dinner.", "Who suffers from diabetes?"),
    ("{} pulls teeth and fills cavities all day.", "Who is a dentist?"),
    ("{} grew up between kangaroos and koalas.", "Who comes from Australia?"),
    ("{} rides through the streets in a red truck with a ladder when something burns.", "Who is a firefighter?"),
    ("{} sees the Golden Gate Bridge from the kitchen.", "Who lives in San Francisco?"),
    ("{} wears a white coat and operates on hearts.", "Who is a surgeon?"),
    ("{} was awarded the gold medal for running a hundred metres.", "Who is a fast sprinter?"),
    ("{} hears nothing and talks with the hands.", "Who is deaf?"),
    ("{} reads Braille.", "Who is blind?"),
    ("{} sneezes whenever birches are in blossom.", "Who has hay fever?"),
    ("{} steers a jet over the ocean three times a week.", "Who is a pilot?"),
    ("{} has a hive and sells honey.", "Who keeps bees?"),
    ("{} walks along the canals by St Mark's Square every evening.", "Who is at home in Venice?"),
    ("{} paid for the ring and will marry in June.", "Who is engaged?"),
    ("{} reached the highest summit of the Himalayas.", "Who has climbed Mount Everest?"),
    ("{} teaches algebra and geometry to children.", "Who is a mathematics teacher?"),
    ("{} kneads dough at three in the morning and sells rolls at six.", "Who is a baker?"),
    ("{} watches the planets through a telescope.", "Who is interested in astronomy?"),
    ("{} cuts hair in a salon.", "Who is a hairdresser?"),
    ("{} has read Hamlet, Macbeth and Othello a dozen times.", "Who admires Shakespeare?"),
    ("{} argues before judges on behalf of clients.", "Who is a lawyer?"),
    ("{} sailed past the Statue of Liberty on the way to the office.", "Who works in New York?"),
    ("{} milks cows and drives a tractor.", "Who is a farmer?"),
    ("{} is afraid of anything with eight legs and a web.", "Who is scared of spiders?"),
    ("{} turned one hundred last week.", "Who is the oldest person here?"),
    ("{} stands on the goal line with thick gloves.", "Who is a goalkeeper?"),
    ("{} gets sick on ships as soon as there are waves.", "Who should not go on a cruise?"),
    ("{} saw the Great Pyramid of Giza from a camel.", "Who has travelled to Egypt?"),
    ("{} repairs leaking taps and blocked drains.", "Who is a plumber?"),
    ("{} gave birth to twins in May.", "Who has become a mother?"),
    ("{} dives with a tank of air to look at corals.", "Who likes scuba?"),
    ("{} lost the driving licence after too much whisky.", "Who had problems with alcohol?"),
    ("{} lays bricks and mixes mortar.", "Who is a builder?"),
    ("{} delivers letters and parcels from door to door.", "Who works for the post office?"),
    ("{} bought a house with a view of Big Ben.", "Who lives in London?"),
    ("{} breaks out in a rash after eating peanuts.", "Who has a food allergy?"),
    ("{} spends the night in a wooden tower to warn boats with a lamp.", "Who is a lighthouse keeper?"),
)
"""What is said of somebody, and what is asked; they share no word but function words."""


def items(setup: Setup) -> list[Item]:
    """Every link at every distance, four to a context."""
    distances = (1024,) if setup.quick else (1024, 2048, 4096)
    contexts = setup.pick(quick=2, standard=len(LINKS) // _TOGETHER)
    out = []
    for draw in range(setup.seeds):
        order = random.Random(_SEED + draw).sample(LINKS, len(LINKS))
        for distance in distances:
            for index in range(contexts):
                links = order[index * _TOGETHER : (index + 1) * _TOGETHER]
                seed = _SEED + 1000 * draw + index
                out.append(Item(f"at {distance}, {index}", seed, _conversation(setup, seed, index, links, distance)))
    return out


def _conversation(setup: Setup, seed: int, index: int, links: Sequence[tuple[str, str]], distance: int) -> Conversation:
    rng = random.Random(seed)
    sentences = Sentences(haystack(setup, index, distance), rng, setup.count)
    names = rng.sample(NAMES, len(links))
    parts: list[str] = []
    for name, (said, _) in zip(names, links, strict=True):
        parts += [sentences.one(), said.format(name), sentences.one()]
    text = " ".join([*parts, *sentences.of_tokens(distance)])
    together = f"One of {', '.join(names)}: "
    questions = [
        Question(f"{together}{asked} Answer with the name.", (name,), {"distance": distance})
        for name, (_, asked) in zip(names, links, strict=True)
    ]
    return Conversation((text,), tuple(questions))


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Whether the answer gives the right name first."""
    names = {name for question in item.data.questions for name in question.wanted}

    def right(answer: str, question: Question) -> bool:
        return first_of(answer, names) == question.wanted[0]

    return ask_conversation(bench, arm, item.data, right, 24)


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Right names by distance."""
    about = f"Share of questions answered with the right one of {_TOGETHER} names, by the tokens since the statements."
    return [shares_table(results, arms, "Asked without any of the words", about, "distance", together="all")]


TASK = Task(
    name="associations",
    part="recall",
    about="Statements about four people, asked for through something everybody knows, in words that share none with them.",
    items=items,
    run=run,
    tables=tables,
)
