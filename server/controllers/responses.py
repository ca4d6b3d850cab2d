"""OpenAI's Responses API; each path also without `/v1`."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, SkipValidation

from server.http import HttpRequest, answer, context_of, generate, generation_responses, json_response, openai_responses
from server.schemas import responses as schema
from server.services.responses import ResponsesService


class ResponsesController(Controller):
    """Responses, and what is kept of them."""

    tags = ("OpenAI",)

    @post(["/v1/responses", "/responses"], status_code=200, responses=generation_responses(schema.ResponseObject))
    async def create(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.ResponsesRequest]],
        responses: NamedDependency[ResponsesService],
    ) -> Response[Any]:
        """Answers what follows a response or a conversation, or begins one."""
        return await generate(request, data, responses.create)

    @post(
        ["/v1/responses/input_tokens", "/responses/input_tokens"],
        status_code=200,
        responses=openai_responses(schema.InputTokens, body=True),
    )
    async def count(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.ResponsesRequest]],
        responses: NamedDependency[ResponsesService],
    ) -> Response[Any]:
        """Counts the tokens a request would read."""
        return await answer(request, data, responses.count)

    @get(
        ["/v1/responses/{response_id:str}", "/responses/{response_id:str}"],
        responses=openai_responses(schema.ResponseObject, 404),
    )
    async def retrieve(
        self, request: HttpRequest, response_id: FromPath[str], responses: NamedDependency[ResponsesService]
    ) -> Response[Any]:
        """A response that is kept."""
        owner = context_of(request).identity.owner
        return json_response(await responses.retrieve(owner, response_id, request.query_params))

    @delete(
        ["/v1/responses/{response_id:str}", "/responses/{response_id:str}"],
        status_code=200,
        responses=openai_responses(schema.DeletedResponse, 404, 403),
    )
    async def remove(
        self, request: HttpRequest, response_id: FromPath[str], responses: NamedDependency[ResponsesService]
    ) -> Response[Any]:
        """Deletes a response, and its session with the last one in it."""
        return json_response(await responses.delete(context_of(request).identity.owner, response_id))

    @post(
        ["/v1/responses/{response_id:str}/cancel", "/responses/{response_id:str}/cancel"],
        status_code=200,
        responses=openai_responses(schema.ResponseObject, 404, body=True),
    )
    async def cancel(
        self, request: HttpRequest, response_id: FromPath[str], responses: NamedDependency[ResponsesService]
    ) -> Response[Any]:
        """Refused by name: no response runs in the background."""
        return json_response(await responses.cancel(context_of(request).identity.owner, response_id))

    @get(
        ["/v1/responses/{response_id:str}/input_items", "/responses/{response_id:str}/input_items"],
        responses=openai_responses(schema.ItemList, 404),
    )
    async def items(
        self, request: HttpRequest, response_id: FromPath[str], responses: NamedDependency[ResponsesService]
    ) -> Response[Any]:
        """What a response was asked."""
        owner = context_of(request).identity.owner
        return json_response(await responses.items(owner, response_id, request.query_params))
