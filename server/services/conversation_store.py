"""Conversations that are kept: a document for each, beside the tree of responses, which holds what was said in them."""

from __future__ import annotations

import time

import msgspec

from server.errors import NotFound
from server.schemas.conversations import Conversation
from server.services.response_store import CONVERSATION, ResponseStore, lane_of


def conversation_not_found(conversation_id: str, *, param: str) -> NotFound:
    """The error of a conversation that is not there, or not any more."""
    return NotFound(
        f"Conversation with id '{conversation_id[:64]}' not found", param=param, code="conversation_not_found"
    )


class ConversationStore:
    """The conversations of every owner; for the event loop."""

    def __init__(self, responses: ResponseStore) -> None:
        self._responses = responses

    async def find(self, owner: str, name: str) -> Conversation | None:
        """A conversation, None where there is none."""
        document = _document(name)
        data = await self._responses.run(lambda documents: documents.read(owner, document))
        return None if data is None else msgspec.json.decode(data, type=Conversation)

    async def begin(self, owner: str, name: str) -> None:
        """Makes sure that a conversation is there."""
        if await self.find(owner, name) is None:
            await self.write(owner, Conversation(id=name, created_at=int(time.time())))

    async def write(self, owner: str, conversation: Conversation) -> None:
        """Keeps a conversation; raises StorageFull, Unavailable."""
        document, data = _document(conversation.id), msgspec.json.encode(conversation)
        await self._responses.run(lambda documents: documents.write(owner, document, data))

    async def delete(self, owner: str, name: str) -> None:
        """Forgets a conversation; what was said in it is the store's of responses."""
        document = _document(name)
        await self._responses.run(lambda documents: documents.delete(owner, document))


def _document(name: str) -> str:
    return CONVERSATION + lane_of(name)
