"""OpenAI's Conversations API; each path also without `/v1`."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, SkipValidation

from server.http import HttpRequest, answer, context_of, json_response, openai_responses
from server.schemas import conversations as schema
from server.schemas.responses import Item, ItemList
from server.services.conversations import ConversationsService


def _paths(rest: str = "") -> list[str]:
    return [f"/v1/conversations{rest}", f"/conversations{rest}"]


_ONE, _ITEMS = "/{conversation_id:str}", "/{conversation_id:str}/items"
_WRITING = (404, 403, 507)


class ConversationsController(Controller):
    """Conversations, and their items."""

    tags = ("OpenAI",)

    @post(_paths(), status_code=200, responses=openai_responses(schema.Conversation, 507, body=True))
    async def create(
        self,
        request: HttpRequest,
        conversations: NamedDependency[ConversationsService],
        data: SkipValidation[JSONBody[schema.ConversationRequest | None]] = None,
    ) -> Response[Any]:
        """Begins a conversation, perhaps with items."""
        return await answer(request, data, conversations.create)

    @get(_paths(_ONE), responses=openai_responses(schema.Conversation, 404))
    async def retrieve(
        self,
        request: HttpRequest,
        conversation_id: FromPath[str],
        conversations: NamedDependency[ConversationsService],
    ) -> Response[Any]:
        """A conversation that is kept."""
        return json_response(await conversations.retrieve(context_of(request).identity.owner, conversation_id))

    @post(_paths(_ONE), status_code=200, responses=openai_responses(schema.Conversation, 404, 507, body=True))
    async def update(
        self,
        request: HttpRequest,
        conversation_id: FromPath[str],
        data: SkipValidation[JSONBody[schema.ConversationUpdate]],
        conversations: NamedDependency[ConversationsService],
    ) -> Response[Any]:
        """Replaces a conversation's metadata."""
        return json_response(await conversations.update(conversation_id, data, context_of(request)))

    @delete(_paths(_ONE), status_code=200, responses=openai_responses(schema.DeletedConversation, *_WRITING))
    async def remove(
        self,
        request: HttpRequest,
        conversation_id: FromPath[str],
        conversations: NamedDependency[ConversationsService],
    ) -> Response[Any]:
        """Deletes a conversation with its responses and its session."""
        return json_response(await conversations.delete(conversation_id, context_of(request)))

    @get(_paths(_ITEMS), responses=openai_responses(ItemList, 404))
    async def items(
        self,
        request: HttpRequest,
        conversation_id: FromPath[str],
        conversations: NamedDependency[ConversationsService],
    ) -> Response[Any]:
        """What was said in a conversation, the latest first unless `order` is `asc`."""
        owner = context_of(request).identity.owner
        return json_response(await conversations.items(owner, conversation_id, request.query_params))

    @post(_paths(_ITEMS), status_code=200, responses=openai_responses(ItemList, 404, 507, body=True))
    async def add(
        self,
        request: HttpRequest,
        conversation_id: FromPath[str],
        data: SkipValidation[JSONBody[schema.ItemsRequest]],
        conversations: NamedDependency[ConversationsService],
    ) -> Response[Any]:
        """Adds items to a conversation."""
        return json_response(await conversations.add(conversation_id, data, context_of(request)))

    @get(_paths(f"{_ITEMS}/{{item_id:str}}"), responses=openai_responses(Item, 404))
    async def item(
        self,
        request: HttpRequest,
        conversation_id: FromPath[str],
        item_id: FromPath[str],
        conversations: NamedDependency[ConversationsService],
    ) -> Response[Any]:
        """One item of a conversation."""
        owner = context_of(request).identity.owner
        return json_response(await conversations.item(owner, conversation_id, item_id))

    @delete(
        _paths(f"{_ITEMS}/{{item_id:str}}"),
        status_code=200,
        responses=openai_responses(schema.Conversation, *_WRITING),
    )
    async def remove_item(
        self,
        request: HttpRequest,
        conversation_id: FromPath[str],
        item_id: FromPath[str],
        conversations: NamedDependency[ConversationsService],
    ) -> Response[Any]:
        """Deletes an item of a conversation."""
        return json_response(await conversations.remove(conversation_id, item_id, context_of(request)))
