"""Ollama's API."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody, SkipValidation

from server.http import HttpRequest, answer, generate, json_response, ollama_responses
from server.schemas import ollama as schema
from server.services.ollama import OllamaService


class OllamaController(Controller):
    """Generation, embeddings and the models, with errors as Ollama's clients expect them."""

    tags = ("Ollama",)

    @post("/api/chat", status_code=200, responses=ollama_responses(schema.OllamaChat, 404, 409, 500, 507, body=True))
    async def chat(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.OllamaChatRequest]],
        ollama: NamedDependency[OllamaService],
    ) -> Response[Any]:
        """Continues a conversation; in a stream unless `stream` is false."""
        return await generate(request, data, ollama.chat)

    @post(
        "/api/generate",
        status_code=200,
        responses=ollama_responses(schema.OllamaGenerated, 404, 409, 500, 507, body=True),
    )
    async def generate(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.OllamaGenerateRequest]],
        ollama: NamedDependency[OllamaService],
    ) -> Response[Any]:
        """Answers a question; in a stream unless `stream` is false."""
        return await generate(request, data, ollama.generate)

    @post("/api/embed", status_code=200, responses=ollama_responses(schema.OllamaEmbedded, 404, 500, 501, body=True))
    async def embed(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.OllamaEmbedRequest]],
        ollama: NamedDependency[OllamaService],
    ) -> Response[Any]:
        """Embeds texts."""
        return await answer(request, data, ollama.embed)

    @post(
        "/api/embeddings", status_code=200, responses=ollama_responses(schema.OllamaEmbedding, 404, 500, 501, body=True)
    )
    async def embed_one(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.OllamaEmbeddingsRequest]],
        ollama: NamedDependency[OllamaService],
    ) -> Response[Any]:
        """Embeds one text; the older form of `/api/embed`."""
        return await answer(request, data, ollama.embed_one)

    @post("/api/show", status_code=200, responses=ollama_responses(schema.OllamaShown, 404, body=True))
    async def show(
        self, data: SkipValidation[JSONBody[schema.OllamaShowRequest]], ollama: NamedDependency[OllamaService]
    ) -> Response[Any]:
        """Describes the model."""
        return json_response(ollama.show(data))

    @get("/api/tags", responses=ollama_responses(schema.OllamaModels))
    async def models(self, ollama: NamedDependency[OllamaService]) -> Response[Any]:
        """Lists the models."""
        return json_response(ollama.tags())

    @get("/api/ps", responses=ollama_responses(schema.OllamaModels))
    async def running(self, ollama: NamedDependency[OllamaService]) -> Response[Any]:
        """Lists the models that are loaded."""
        return json_response(ollama.running())

    @get("/api/version", responses=ollama_responses(schema.OllamaVersion))
    async def version(self, ollama: NamedDependency[OllamaService]) -> Response[Any]:
        """Tells the server's version."""
        return json_response(ollama.version())
