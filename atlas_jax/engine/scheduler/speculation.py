"""Whether a decode step feeds draft tokens: as the latest ones of its rows have turned out, and as long as a step takes.

A step with drafts takes longer (SmolLM2-135M 1.25 times, a Llama of 1B 1.4 times as long on two cores), so drafts that are
wrong cost as much as right ones bring. Every step says which tokens it would guess next, fed or not: a row whose drafts are
not fed finds out for nothing what they would have brought. Which tokens come does not depend on the choice.

A row's estimate is its own and begins anew with every request: what one says does not show in another's timing.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable, Sequence

_START = 0.45
"""Right drafts a step that a row is taken for at first: worth a few steps with drafts, and no more if they are wrong."""
_WEIGHT = 0.125
"""Of the latest step in a row's estimate."""
_RATIO = 1.4
"""How much longer a step with drafts takes, as long as that has not been measured."""
_SAMPLES = 15
_FEWEST = 3
"""Steps of either kind that are measured before the measure is believed."""
_PROBE = 128
_FIRST_PROBE = 16
"""Steps after which one is of the other kind, to measure how long it takes; the latter as long as that is not known."""


class DraftRecord:
    """How many drafts of a row have been right lately.

    Attributes:
      rate: right drafts a step, about.
    """

    def __init__(self) -> None:
        self.rate = _START
        self._open: list[tuple[Sequence[int], int]] = []

    def note(self, fed: int, drawn: Sequence[int], drafts: Sequence[int]) -> None:
        """Takes note of a step.

        Args:
          fed: tokens that the row was fed.
          drawn: what was drawn, at least one token.
          drafts: what the step would guess to come next.
        """
        if fed > 1:
            self._open.clear()
            self._count(len(drawn) - 1)
        else:
            open_before, self._open = self._open, []
            for proposed, right in open_before:
                if proposed[right] != drawn[0]:
                    self._count(right)
                elif right + 1 == len(proposed):
                    self._count(right + 1)
                else:
                    self._open.append((proposed, right + 1))
        if len(drafts):
            self._open.append((drafts, 0))

    def _count(self, right: int) -> None:
        self.rate += _WEIGHT * (right - self.rate)


class StepWidths:
    """Chooses how many tokens a row is fed in the next step."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, deque[float]] = {}
        self._steps = 0

    def measured(self, shape: Hashable, width: int, seconds: float) -> None:
        """Takes note of how long a step took."""
        self._seconds.setdefault((shape, width), deque(maxlen=_SAMPLES)).append(seconds)

    def ratio(self, shape: Hashable, plain: int, drafting: int) -> float:
        """How many times as long as a step of `plain` tokens one of `drafting` takes; never less than 1."""
        if not self._known(shape, plain, drafting):
            return _RATIO
        one, other = (statistics.median(self._seconds[shape, width]) for width in (plain, drafting))
        return max(1.0, other / one)

    def _known(self, shape: Hashable, *widths: int) -> bool:
        return all(len(self._seconds.get((shape, width), ())) >= _FEWEST for width in widths)

    def choose(self, shape: Hashable, widths: Sequence[int], rates: Sequence[float]) -> int:
        """The width of the next step.

        Args:
          shape: of the batch: what a step takes is measured for each.
          widths: of the programs there are, ascending.
          rates: `DraftRecord.rate` of every row that takes part; 0 of one that takes no drafts.
        """
        plain, drafting = widths[0], widths[-1]
        if plain == drafting or not any(rates):
            return plain
        mean = sum(rates) / len(rates)
        chosen = drafting if 1.0 + mean > self.ratio(shape, plain, drafting) else plain
        self._steps += 1
        if self._steps % (_PROBE if self._known(shape, plain, drafting) else _FIRST_PROBE):
            return chosen
        return plain if chosen == drafting else drafting
