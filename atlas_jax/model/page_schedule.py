"""Which page goes where, what has left the window, and when the memory is written: plain arithmetic on positions.

Everything here follows from a position alone, so reading a text token by token, in chunks, or with a restart in between
makes the same pages leave at the same moments.
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas_jax.config import PAGE


@dataclass(frozen=True)
class PageSchedule:
    """How one sequence uses its ring of pages.

    Attributes:
      window: pages attended exactly (the current one included), or None for all: the plain model.
      update: pages per memory write; pages leave the window in groups of this size.
    """

    window: int | None
    update: int = 1

    @property
    def room(self) -> int:
        """Ring slots of a window, whose pages leave in groups; 0 for the plain model."""
        return 0 if self.window is None else self.window + self.update - 1

    def left(self, page: int) -> int:
        """How many pages have left the window once `page` has begun: a multiple of `update`."""
        if self.window is None:
            return 0
        return max(0, page - self.window + 1) // self.update * self.update

    def ring(self, tokens: int) -> int:
        """Ring slots that a text of `tokens` tokens needs."""
        pages = max(1, -(-tokens // PAGE))
        return pages if self.window is None else min(pages, self.room)

    def slot(self, page: int) -> int:
        """Ring slot of a page. While nothing has left, a page's slot is its number, whatever the ring's size."""
        return page if self.window is None else page % self.room

    def next_page(self, page: int) -> NextPage:
        """What happens when `page` begins."""
        before, now = self.left(page - 1), self.left(page)
        return NextPage(
            page=page,
            slot=self.slot(page),
            first_page=now,
            sink_slot=self.slot(0) if now > 0 and before == 0 else -1,
            absorb_end=now * PAGE if now > before else None,
            leaves=tuple(self.slot(gone) for gone in range(before, now)),
        )


@dataclass(frozen=True)
class NextPage:
    """The beginning of a page.

    Attributes:
      sink_slot: ring slot of page 0 if that page leaves now, else −1.
      absorb_end: position of the first token still in the window if the memory is to be written now, else None.
      leaves: ring slots of the pages that leave now, in order.
    """

    page: int
    slot: int
    first_page: int
    sink_slot: int
    absorb_end: int | None
    leaves: tuple[int, ...] = ()


def bucket(value: int, sizes: tuple[int, ...]) -> int:
    """The smallest of `sizes` (ascending) that holds `value`.

    Raises:
      ValueError: none does.
    """
    for size in sizes:
        if size >= value:
            return size
    raise ValueError(f"{value} exceeds the largest size {sizes[-1]}")
