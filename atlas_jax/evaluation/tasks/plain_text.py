"""Harm on text that gives a memory nothing to remember: loss must not be above that of the window alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

from atlas_jax.evaluation.arms import WINDOW, Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.statistics import Estimate, mean
from atlas_jax.evaluation.tables import Table
from atlas_jax.evaluation.tasks.loss import START, Reading

_SEED = 6041
_PASSAGE = 700
"""Characters of a passage in a medley, at most."""


def items(setup: Setup) -> list[Item]:
    """Prose and documentation as they are, and medleys of short passages that have nothing to do with one another."""
    tokens = 1536 if setup.quick else 4608
    texts = list(setup.texts.group("perplexity").items())
    out = [Item(name, 0, Reading(text, tokens)) for name, text in texts[: setup.pick(quick=1, standard=len(texts))]]
    for draw in range(setup.seeds):
        for index in range(setup.pick(quick=1, standard=4)):
            seed = _SEED + 1000 * draw + index
            out.append(Item(f"medley {index}", seed, Reading(_medley(setup, seed, tokens), tokens)))
    return [item for item in out if setup.count(item.data.text) > START + 128]


def _medley(setup: Setup, seed: int, tokens: int) -> str:
    """Passages of all documents in a random order, never two of one document in a row, each passage once."""
    rng = random.Random(seed)
    stacks = []
    for group in ("documents", "perplexity"):
        for text in setup.texts.group(group).values():
            passages = [part for part in text.split("\n\n") if 200 < len(part) <= _PASSAGE]
            stacks.append(rng.sample(passages, len(passages)))
    out: list[str] = []
    size = 0
    while size < tokens and any(stacks):
        rng.shuffle(stacks)
        for stack in (stack for stack in stacks if stack):
            out.append(stack.pop())
            size += setup.count(out[-1])
    return "\n\n".join(out)


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Mean nats past the window."""
    nats = bench.losses(bench.tokens(item.data.text)[: item.data.tokens], arm)[START:]
    kind = "medleys" if item.name.startswith("medley") else "texts"
    return [Value("nats", float(nats.mean()), {"kind": kind}, len(nats))]


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Losses against the window alone: of texts, of medleys, and the largest."""
    losses: dict[str, dict[tuple[str, int], Result]] = {}
    for result in results:
        losses.setdefault(result.arm, {})[result.item, result.seed] = result
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, Estimate]] = {}
    for arm in arms:
        row: dict[str, Estimate] = {}
        for kind in ("texts", "medleys"):
            own = {key: r.value.value for key, r in losses[arm].items() if r.value.labels["kind"] == kind}
            both = sorted(own.keys() & losses.get(WINDOW, {}).keys())
            if both:
                against = [own[key] - losses[WINDOW][key].value.value for key in both]
                row[f"{kind}: loss"] = mean(list(own.values()))
                row[f"{kind}: against the window"] = mean(against)
                row[f"{kind}: worst"] = Estimate(max(against), float("nan"), float("nan"), 1)
        columns |= dict.fromkeys(row)
        rows[arm] = row
    about = f"Nats of the tokens from position {START} on, and how much more they are than with the window alone."
    return [Table("Text without repetition", about, tuple(columns), rows, form=".4f")]


TASK = Task(
    name="plain text",
    part="harm",
    about="Prose and documentation as they are, and medleys: short passages of many documents, each once, in random order.",
    items=items,
    run=run,
    tables=tables,
)
