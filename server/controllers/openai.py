"""The OpenAI surface: completions, chat completions, models; each path also without `/v1`."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, SkipValidation

from server.http import HttpRequest, answer, generate, generation_responses, json_response, openai_responses
from server.schemas.chat import ChatCompletion, ChatRequest
from server.schemas.completions import Completion, CompletionRequest
from server.schemas.embeddings import Embeddings, EmbeddingsRequest
from server.schemas.models import AnthropicModel, AnthropicModels, Model, ModelList
from server.services.embeddings import EmbeddingService
from server.services.inference import Inference
from server.services.models import Models

_ANTHROPIC = "anthropic-version"
"""A header that all clients of Anthropic's API send; two of its paths are OpenAI's as well."""


class OpenAIController(Controller):
    """Generation and the model list."""

    tags = ("OpenAI",)

    @post(
        ["/v1/completions", "/completions"],
        status_code=200,
        responses=generation_responses(Completion),
    )
    async def completions(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[CompletionRequest]],
        inference: NamedDependency[Inference],
    ) -> Response[Any]:
        """Continues text."""
        return await generate(request, data, inference.completion)

    @post(
        ["/v1/chat/completions", "/chat/completions"],
        status_code=200,
        responses=generation_responses(ChatCompletion),
    )
    async def chat(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[ChatRequest]],
        inference: NamedDependency[Inference],
    ) -> Response[Any]:
        """Continues a conversation."""
        return await generate(request, data, inference.chat)

    @post("/v1/embeddings", status_code=200, responses=openai_responses(Embeddings, 404, 500, 501, 507, body=True))
    async def embeddings(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[EmbeddingsRequest]],
        embeddings: NamedDependency[EmbeddingService],
    ) -> Response[Any]:
        """Embeds texts."""
        return await answer(request, data, embeddings.openai)

    @get(["/v1/models", "/models"], responses=openai_responses(ModelList | AnthropicModels))
    async def list_models(self, request: HttpRequest, models: NamedDependency[Models]) -> Response[Any]:
        """Lists the models; to Anthropic's clients, which send `anthropic-version`, in the words of its API."""
        if _ANTHROPIC in request.headers:
            listed = [models.describe_to_anthropic(name) for name in models.names]
            return json_response(AnthropicModels(data=listed, first_id=listed[0].id, last_id=listed[-1].id))
        return json_response(ModelList(data=[models.describe(name) for name in models.names]))

    @get(
        ["/v1/models/{model_id:path}", "/models/{model_id:path}"],
        responses=openai_responses(Model | AnthropicModel, 404),
    )
    async def get_model(
        self, request: HttpRequest, model_id: FromPath[str], models: NamedDependency[Models]
    ) -> Response[Any]:
        """Describes one model; the id may contain slashes."""
        describe = models.describe_to_anthropic if _ANTHROPIC in request.headers else models.describe
        return json_response(describe(model_id.removeprefix("/")))
