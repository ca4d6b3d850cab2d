"""Pages of the items of a response or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from server.schemas import responses as schema
from server.validation import invalid

_LIMIT, _MOST = 20, 100


@dataclass(frozen=True, slots=True)
class ItemPage:
    """Which items are asked for, of a list from the oldest to the latest."""

    limit: int
    order: str
    after: str | None

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> ItemPage:
        """What a query says; raises BadRequest."""
        given = query.get("limit", str(_LIMIT))
        limit = int(given) if given.isascii() and given.isdecimal() and len(given) < 4 else 0
        if not 1 <= limit <= _MOST:
            raise invalid("limit", f"value must be between 1 and {_MOST}")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise invalid("order", "value must be one of asc, desc")
        return cls(limit, order, query.get("after"))

    def of(self, items: Sequence[schema.Item]) -> bytes:
        """The page as JSON; raises BadRequest where it would begin after an item that is not there."""
        found = list(items if self.order == "asc" else items[::-1])
        if self.after is not None:
            at = next((index for index, item in enumerate(found) if item.id == self.after), None)
            if at is None:
                raise invalid("after", "no such item")
            found = found[at + 1 :]
        return item_list(found[: self.limit], has_more=len(found) > self.limit)


def item_list(items: Sequence[schema.Item], *, has_more: bool = False) -> bytes:
    """Items as JSON."""
    return msgspec.json.encode(
        schema.ItemList(
            data=list(items),
            first_id=items[0].id if items else None,
            last_id=items[-1].id if items else None,
            has_more=has_more,
        )
    )
