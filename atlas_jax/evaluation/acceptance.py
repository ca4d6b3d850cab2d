"""What the memory is to reach, and what was measured of it: one line for each bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from atlas_jax.evaluation.arms import FULL, LARGER, WINDOW
from atlas_jax.evaluation.measures import Result
from atlas_jax.evaluation.statistics import Estimate
from atlas_jax.evaluation.tables import mean_of_items, only, share
from atlas_jax.evaluation.tasks.facts import FACTS, OTHERS, SAME, wordings_of
from atlas_jax.evaluation.tasks.loss import by_document, gap_closed, harm

Results = Mapping[str, Sequence[Result]]


@dataclass(frozen=True)
class Line:
    """One bar.

    Attributes:
      met: None where it was not measured.
    """

    bar: str
    measured: str
    met: bool | None

    def markdown(self) -> str:
        """A row of the table."""
        verdict = {True: "met", False: "**not met**", None: "not measured"}[self.met]
        return f"| {self.bar} | {self.measured} | {verdict} |"


def lines(results: Results, arm: str) -> list[Line]:
    """Every bar for one arm, from the results of all tasks by name."""
    out = [
        *_loss(results.get("loss", ()), arm),
        *_facts(results.get("facts", ()), arm),
        _chat(results.get("chat", ()), arm),
        *_ruler(results.get("ruler", ()), arm),
        _plain_text(results.get("plain text", ()), arm),
        _reasoning(results.get("reasoning", ()), arm),
    ]
    return out + _cost(results.get("cost", ()), arm)


def markdown(results: Results, arm: str) -> str:
    """The table of an arm."""
    rows = [line.markdown() for line in lines(results, arm)]
    return "\n".join([f"### {arm}", "", "| bar | measured | |", "|---|---|---|", *rows])


def _at_least(bar: str, found: Estimate | None, least: float, form: str = ".2f") -> Line:
    if found is None or math.isnan(found.value):
        return Line(bar, "–", None)
    return Line(bar, f"{found.text(form)}, {found.count}", found.value >= least)


def _loss(results: Sequence[Result], arm: str) -> list[Line]:
    out = []
    for length in (4608, 7680):
        losses = by_document(results, length)
        gap = gap_closed(losses, arm)
        out.append(_at_least(f"{length} tokens: gap closed ≥ 0.80 over ≥ 12 documents", gap, 0.80))
        if out[-1].met and gap.count < 12:
            out[-1] = Line(out[-1].bar, out[-1].measured, False)
        bar = f"{length} tokens: above a larger window of the same bytes by ≥ 0.15 of the gap"
        larger = gap_closed(losses, LARGER)
        above = gap.value - larger.value
        out.append(Line(bar, "–", None) if math.isnan(above) else Line(bar, f"{above:+.2f}", above >= 0.15))
        worst = harm(losses, arm)
        bar = f"{length} tokens: no document hurt by more than 0.005 nats"
        out.append(
            Line(bar, "–", None)
            if worst is None
            else Line(bar, f"{worst[0]:+.4f} at most ({worst[1]})", worst[0] <= 0.005)
        )
    bar = "32 768 tokens: loss of the last part no higher than at 8 000"
    late = {r.item: r.value.value for r in only(_of(results, arm), "nats", to=32768)}
    early = {r.item: r.value.value for r in only(_of(results, arm), "nats", to=7680)}
    both = sorted(late.keys() & early.keys())
    if not both:
        return [*out, Line(bar, "–", None)]
    first, last = (sum(found[name] for name in both) / len(both) for found in (early, late))
    return [*out, Line(bar, f"{last:.3f} against {first:.3f}, {len(both)} documents", last <= first)]


def _facts(results: Sequence[Result], arm: str) -> list[Line]:
    found = [r for r in only(results, "found") if r.value.labels["facts"] == FACTS]

    def shares(of: str, wording: str, keep: Callable[[int], bool]) -> Estimate | None:
        part = [r for r in _of(found, of) if wording in wordings_of(r) and keep(int(r.value.labels["distance"]))]
        return share(part) if part else None

    def near(distance: int) -> bool:
        return 2048 <= distance <= 8192

    out = [_at_least("facts in the same words at 2 000 to 8 000 tokens ≥ 0.9", shares(arm, SAME, near), 0.9)]
    for distance, least in ((32768, 0.8), (131072, 0.6)):
        there = shares(arm, SAME, lambda one, distance=distance: one == distance)  # type: ignore[misc]
        out.append(_at_least(f"facts in the same words at {distance} tokens ≥ {least}", there, least))
    out.append(_at_least("facts in five other wordings together ≥ 0.5", shares(arm, OTHERS, near), 0.5))
    wordings = dict.fromkeys(str(r.value.labels["wording"]) for r in found if r.value.labels["wording"] != SAME)
    below = []
    for wording in wordings:
        own, full = (shares(of, wording, near) for of in (arm, FULL))
        if own is None or full is None:
            return [*out, Line("each other wording above full attention's", "–", None)]
        if own.value <= full.value:
            below.append(f"{wording} {own.value:.2f} against {full.value:.2f}")
    said = "; ".join(below) or "all"
    return [*out, Line("each other wording above full attention's", said, not below if wordings else None)]


def _chat(results: Sequence[Result], arm: str) -> Line:
    bar = "chat facts: as many as full attention or more"
    own, full = (only(_of(results, of), "found") for of in (arm, FULL))
    if not own or not full:
        return Line(bar, "–", None)
    counts = [int(sum(r.value.value for r in part)) for part in (own, full)]
    return Line(bar, f"{counts[0]} against {counts[1]} of {len(own)}", counts[0] >= counts[1])


def _ruler(results: Sequence[Result], arm: str) -> list[Line]:
    bar = "RULER at 4 096: within 5 points of full attention"
    own, full = (mean_of_items(only(_of(results, of), "score", length=4096)) for of in (arm, FULL))
    if not own.count or not full.count:
        return [Line(bar, "–", None)]
    return [Line(bar, f"{100 * own.value:.1f} against {100 * full.value:.1f}", own.value >= full.value - 0.05)]


def _plain_text(results: Sequence[Result], arm: str) -> Line:
    bar = "text without repetition: ≤ 0.005 nats above the window alone"
    own, window = ({(r.item, r.seed): r.value.value for r in _of(results, of)} for of in (arm, WINDOW))
    both = own.keys() & window.keys()
    if not both:
        return Line(bar, "–", None)
    against = sum(own[key] - window[key] for key in both) / len(both)
    worst = max(own[key] - window[key] for key in both)
    return Line(bar, f"{against:+.4f} on average, {worst:+.4f} at most, {len(both)} texts", against <= 0.005)


def _reasoning(results: Sequence[Result], arm: str) -> Line:
    bar = "exercises that need no memory: within one point of the window alone"
    own, window = (share(only(_of(results, of), "found")) for of in (arm, WINDOW))
    if not own.count or not window.count:
        return Line(bar, "–", None)
    said = f"{100 * own.value:.1f} against {100 * window.value:.1f} of 100, {own.count} exercises"
    return Line(bar, said, own.value >= window.value - 0.01)


def _cost(results: Sequence[Result], arm: str) -> list[Line]:
    own = _of(results, arm)
    out = []
    for what in ("prefill", "decode"):
        ratios = sorted(r.value.value for r in only(own, what))
        bar = f"{what}: at most 15 % slower than a plain window with as many attended tokens"
        middle = ratios[len(ratios) // 2] if ratios else math.nan
        out.append(Line(bar, f"{1 - middle:.0%} slower", middle >= 1 / 1.15) if ratios else Line(bar, "–", None))
    resident = [r.value.value for r in only(own, "resident")]
    bar = "state ≤ 16 MB of a session in memory"
    out.append(Line(bar, f"{resident[0]:.1f} MB", resident[0] <= 16) if resident else Line(bar, "–", None))
    for measure in ("ms to read", "ms to write"):
        places: dict[int, list[float]] = {}
        for r in only(own, measure):
            places.setdefault(int(r.value.labels["length"]), []).append(r.value.value)
        bar = f"{measure} a token: flat along a session (within 15 %)"
        if len(places) < 2:
            out.append(Line(bar, "–", None))
            continue
        medians = [sorted(places[place])[len(places[place]) // 2] for place in sorted(places)]
        said = f"{medians[-1] / medians[0]:.2f} times as long at {max(places)} as at {min(places)}"
        out.append(Line(bar, said, medians[-1] <= 1.15 * medians[0]))
    return out


def _of(results: Sequence[Result], arm: str) -> list[Result]:
    return [result for result in results if result.arm == arm]
