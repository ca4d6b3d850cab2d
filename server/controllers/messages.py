"""Anthropic's Messages API."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Response, post
from litestar.di import NamedDependency
from litestar.params import JSONBody, SkipValidation

from server.http import HttpRequest, answer, anthropic_responses, generate
from server.schemas import messages as schema
from server.services.messages import MessagesService


class MessagesController(Controller):
    """Generation and counting, with errors as Anthropic's clients expect them."""

    tags = ("Anthropic",)

    @post("/v1/messages", status_code=200, responses=anthropic_responses(schema.Message, 404, 409, 500, 507))
    async def create(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.MessagesRequest]],
        messages: NamedDependency[MessagesService],
    ) -> Response[Any]:
        """Continues a conversation."""
        return await generate(request, data, messages.create)

    @post("/v1/messages/count_tokens", status_code=200, responses=anthropic_responses(schema.TokenCount, 404))
    async def count(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.CountRequest]],
        messages: NamedDependency[MessagesService],
    ) -> Response[Any]:
        """Counts the tokens of a conversation."""
        return await answer(request, data, messages.count)
