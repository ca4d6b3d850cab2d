"""`/v1/conversations`: what is said in a conversation is kept as responses are, and each has a session by its name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from server.errors import NotFound
from server.middleware.request_context import RequestContext
from server.schemas import conversations as schema
from server.schemas.responses import Item
from server.services import responses_api as api
from server.services.conversation_store import ConversationStore, conversation_not_found
from server.services.item_pages import ItemPage, item_list
from server.services.response_builder import new_id
from server.services.response_sessions import ResponseSessions
from server.services.response_store import NO_RESPONSE, TURN, Record, ResponseStore
from server.validation import parse


class ConversationsService:
    """The Conversations API."""

    def __init__(
        self, *, conversations: ConversationStore, responses: ResponseStore, sessions: ResponseSessions
    ) -> None:
        self._conversations, self._responses, self._sessions = conversations, responses, sessions

    async def create(self, raw: Any, context: RequestContext) -> bytes:
        """Begins a conversation."""
        body, owner = parse(schema.ConversationRequest, raw), context.identity.owner
        made = schema.Conversation(id=new_id("conv"), created_at=int(time.time()), metadata=body.metadata or {})
        items = api.input_items(body.items, "items") if body.items else []
        api.check_outputs((), items, "items")
        await self._conversations.write(owner, made)
        if items:
            await self._add(owner, made.id, items)
        return msgspec.json.encode(made)

    async def retrieve(self, owner: str, name: str) -> bytes:
        """A conversation."""
        return msgspec.json.encode(await self._found(owner, name))

    async def update(self, name: str, raw: Any, context: RequestContext) -> bytes:
        """Replaces the metadata of a conversation."""
        body, owner = parse(schema.ConversationUpdate, raw), context.identity.owner
        await self._sessions.lock(owner, name, context)
        found = msgspec.structs.replace(await self._found(owner, name), metadata=body.metadata or {})
        await self._conversations.write(owner, found)
        return msgspec.json.encode(found)

    async def delete(self, name: str, context: RequestContext) -> bytes:
        """Deletes a conversation, all that was said in it, and its session."""
        owner = context.identity.owner
        await self._sessions.lock(owner, name, context)
        await self._found(owner, name)
        await self._responses.delete_lane(owner, name)
        await self._sessions.delete(owner, name)
        await self._conversations.delete(owner, name)
        return msgspec.json.encode(schema.DeletedConversation(id=name))

    # --- items ----------------------------------------------------------------------------------------------------
    async def items(self, owner: str, name: str, query: Mapping[str, str]) -> bytes:
        """One page of a conversation's items."""
        page = ItemPage.parse(query)
        return page.of([item for record in await self._said(owner, name) for item in record.items])

    async def add(self, name: str, raw: Any, context: RequestContext) -> bytes:
        """Adds items at the end."""
        body, owner = parse(schema.ItemsRequest, raw), context.identity.owner
        items = api.input_items(body.items, "items")
        await self._sessions.lock(owner, name, context)
        said = await self._said(owner, name)
        api.check_outputs((item for record in said for item in record.items), items, "items")
        await self._add(owner, name, items)
        return item_list(items)

    async def item(self, owner: str, name: str, item_id: str) -> bytes:
        """One item."""
        _, found = self._of(await self._said(owner, name), item_id)
        return msgspec.json.encode(found)

    async def remove(self, name: str, item_id: str, context: RequestContext) -> bytes:
        """Deletes an item, and the session, which has read it: the next response reads the others anew."""
        owner = context.identity.owner
        await self._sessions.lock(owner, name, context)
        conversation = await self._found(owner, name)
        record, found = self._of(await self._said(owner, name), item_id)
        left = {part: [item for item in getattr(record, part) if item is not found] for part in ("input", "output")}
        await self._sessions.delete(owner, name)
        await self._responses.rewrite(owner, msgspec.structs.replace(record, **left))
        return msgspec.json.encode(conversation)

    async def _found(self, owner: str, name: str) -> schema.Conversation:
        found = await self._conversations.find(owner, name)
        if found is None:
            raise conversation_not_found(name, param="conversation_id")
        return found

    async def _said(self, owner: str, name: str) -> list[Record]:
        await self._found(owner, name)
        last = await self._responses.last_of(owner, name)
        return [] if last is None else await self._responses.chain(owner, last)

    def _of(self, said: list[Record], item_id: str) -> tuple[Record, Item]:
        for record in said:
            for item in record.items:
                if item.id == item_id:
                    return record, item
        raise NotFound(f"Item with id '{item_id[:64]}' not found", param="item_id", code="item_not_found")

    async def _add(self, owner: str, name: str, items: list[Item]) -> None:
        last = await self._responses.last_of(owner, name)
        record = Record(
            id=new_id(TURN),
            parent=None if last is None else last.id,
            session=name,
            input=items,
            output=[],
            response=NO_RESPONSE,
        )
        await self._responses.add(owner, record)
