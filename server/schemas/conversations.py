"""`/v1/conversations`: conversations that are kept, and their items."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from server.schemas.responses import InputItems, Metadata


class ConversationRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A conversation to begin, perhaps with items."""

    items: InputItems | None = None
    metadata: Metadata | None = None


class ConversationUpdate(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The metadata that take the place of those there were."""

    metadata: Metadata | None


class ItemsRequest(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Items to add at the end."""

    items: Annotated[InputItems, Meta(min_length=1)]


class Conversation(Struct, kw_only=True, frozen=True):
    """A conversation."""

    id: str
    created_at: int
    metadata: Metadata = {}
    object: Literal["conversation"] = "conversation"


class DeletedConversation(Struct, kw_only=True, frozen=True):
    """What became of a conversation."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: bool = True
