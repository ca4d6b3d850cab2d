"""Loss by position: what a document's later tokens cost once its beginning has left the window."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from atlas_jax.evaluation.arms import FULL, WINDOW, Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.statistics import NOTHING, Estimate, mean, ratio_of_means
from atlas_jax.evaluation.tables import Table, cells, mean_of_items, only

START = 512
"""Positions from here on count for every arm: the default window holds those before."""
_EDGES = (START, 1024, 2048, 4608, 7680, 16384, 32768, 65536, 131072)
LENGTHS = (2048, 4608, 7680, 32768, 131072)
"""A document that is read on counts for every length that it reaches: attention is causal."""
_QUICK = ("docutils_faq", "psutil_history", "trio_design")
SHELVES = (
    ("lcet10", "alice29"),
    ("plrabn12", "asyoulik"),
    ("britannica", "richard_iii"),
    ("comus", "hamlet"),
)
"""Books that are read one after the other, each pair more than 131 072 tokens of SmolLM2's."""


@dataclass(frozen=True)
class Reading:
    """A text and how many of its tokens are read."""

    text: str
    tokens: int


def items(setup: Setup) -> list[Item]:
    """Documents that are longer than the shortest length, cut to the longest they reach."""
    documents = setup.texts.group("documents")
    most = 2048 if setup.quick else 7680
    if setup.quick and set(_QUICK) <= documents.keys():
        documents = {name: documents[name] for name in _QUICK}
    found = [(name, text, most) for name, text in documents.items()]
    if setup.long:
        books = setup.texts.group("books")
        found += [(" and ".join(shelf), "\n\n".join(books[name] for name in shelf), LENGTHS[-1]) for shelf in SHELVES]
    out = []
    for name, text, limit in found:
        reached = [length for length in LENGTHS if length <= min(setup.count(text), limit)]
        if reached:
            out.append(Item(name, 0, Reading(text, reached[-1])))
    return out


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Mean nats by position, and past the window up to each length."""
    tokens = bench.tokens(item.data.text)[: item.data.tokens]
    nats = bench.losses(tokens, arm)
    out = []
    for low, high in itertools.pairwise(_EDGES):
        part = nats[low:high]
        if len(part):
            out.append(Value("nats", float(part.mean()), {"from": low, "to": high}, len(part)))
    for length in LENGTHS:
        if START < length <= len(nats):
            part = nats[START:length]
            out.append(Value("past the window", float(part.mean()), {"length": length}, len(part)))
    return out


def by_document(results: Sequence[Result], length: int) -> dict[str, dict[str, float]]:
    """Losses past the window up to a length, by arm and document."""
    out: dict[str, dict[str, float]] = {}
    for result in only(results, "past the window", length=length):
        out.setdefault(result.arm, {})[result.item] = result.value.value
    return out


def gap_closed(losses: dict[str, dict[str, float]], arm: str) -> Estimate:
    """What the arm wins back of what the window costs against full attention, as a ratio of means over documents."""
    if not {arm, WINDOW, FULL} <= losses.keys():
        return NOTHING
    window, full, own = losses[WINDOW], losses[FULL], losses[arm]
    both = sorted(window.keys() & full.keys() & own.keys())
    return ratio_of_means([(window[name] - own[name], window[name] - full[name]) for name in both])


def harm(losses: dict[str, dict[str, float]], arm: str) -> tuple[float, str] | None:
    """By how much the document that the arm hurts most is worse than with the window alone, and its name."""
    if not {arm, WINDOW} <= losses.keys():
        return None
    both = losses[arm].keys() & losses[WINDOW].keys()
    return max(((losses[arm][name] - losses[WINDOW][name], name) for name in both), default=None)


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Loss by position, then for every length the gap that is closed and the documents one by one."""
    columns, rows = cells(
        only(results, "nats"), arms, lambda r: [f"{r.value.labels['from']}–{r.value.labels['to']}"], mean_of_items
    )
    out = [
        Table(
            "Loss by position",
            "Mean nats of the tokens at these positions, mean over documents.",
            columns,
            rows,
            x="position",
        )
    ]
    for length in LENGTHS:
        if losses := by_document(results, length):
            out += _tables_of_length(losses, arms, length)
    return out


def _tables_of_length(losses: dict[str, dict[str, float]], arms: Sequence[str], length: int) -> list[Table]:
    summary: dict[str, dict[str, Estimate]] = {}
    for arm in (arm for arm in arms if arm in losses):
        row = {"mean loss": mean(list(losses[arm].values())), "gap closed": gap_closed(losses, arm)}
        if worst := harm(losses, arm):
            row["worst document against the window"] = Estimate(worst[0], float("nan"), float("nan"), 1)
        if WINDOW in losses and len(both := losses[arm].keys() & losses[WINDOW].keys()):
            row["against the window"] = mean([losses[arm][name] - losses[WINDOW][name] for name in sorted(both)])
        summary[arm] = row
    columns = ("mean loss", "against the window", "gap closed", "worst document against the window")
    count = max(len(of_arm) for of_arm in losses.values())
    names = sorted({name for of_arm in losses.values() for name in of_arm})
    single = {
        name: {arm: _one(losses[arm][name]) for arm in losses if name in losses[arm]}
        | {f"gap closed by {arm}": _gap(losses, arm, name) for arm in losses if arm not in (WINDOW, FULL)}
        for name in names
    }
    inner = [arm for arm in arms if arm in losses]
    gaps = [f"gap closed by {arm}" for arm in inner if arm not in (WINDOW, FULL)]
    if FULL not in losses or WINDOW not in losses:
        gaps = []
    return [
        Table(
            f"Loss past the window, {length} tokens",
            f"Nats of the tokens from position {START} to {length}, {count} documents. Gap closed: (window − arm) / "
            "(window − full), of the means.",
            columns,
            summary,
        ),
        Table(f"Documents of {length} tokens", "Nats past the window.", (*inner, *gaps), single),
    ]


def _one(value: float) -> Estimate:
    return Estimate(value, float("nan"), float("nan"), 1)


def _gap(losses: dict[str, dict[str, float]], arm: str, name: str) -> Estimate:
    if not all(name in losses.get(one, {}) for one in (WINDOW, FULL, arm)):
        return NOTHING
    window, full = losses[WINDOW][name], losses[FULL][name]
    return _one((window - losses[arm][name]) / (window - full)) if window != full else NOTHING


TASK = Task(
    name="loss",
    part="loss",
    about="Documents that no part of the memory was fitted to, read once from their beginning.",
    items=items,
    run=run,
    tables=tables,
)
