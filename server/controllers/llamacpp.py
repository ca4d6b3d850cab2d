"""The endpoints clients of llama.cpp's server know: tokens, template, properties, slots."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody, SkipValidation

from server.errors import Forbidden
from server.http import HttpRequest, answer, context_of, generate, generation_responses, json_response, openai_responses
from server.schemas import llamacpp as schema
from server.schemas.embeddings import LlamaEmbedding, LlamaEmbeddingsRequest
from server.schemas.sampling import LoraScales
from server.services.embeddings import EmbeddingService
from server.services.llamacpp import LlamaCppService
from server.validation import parse


class LlamaCppController(Controller):
    """Completions, tokenizer and introspection."""

    tags = ("llama.cpp",)

    @post("/completion", status_code=200, responses=generation_responses(schema.LlamaCompletion))
    async def completion(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.LlamaCompletionRequest]],
        llamacpp: NamedDependency[LlamaCppService],
    ) -> Response[Any]:
        """Continues text."""
        return await generate(request, data, llamacpp.completion)

    @post("/infill", status_code=200, responses=generation_responses(schema.LlamaCompletion, 501))
    async def infill(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.InfillRequest]],
        llamacpp: NamedDependency[LlamaCppService],
    ) -> Response[Any]:
        """Fills a gap in a text, with a model that was taught to."""
        return await generate(request, data, llamacpp.infill)

    @post(
        ["/v1/rerank", "/v1/reranking", "/rerank", "/reranking"],
        status_code=200,
        responses=openai_responses(schema.Reranked, 501, body=True),
    )
    async def rerank(
        self, data: SkipValidation[JSONBody[schema.RerankRequest]], llamacpp: NamedDependency[LlamaCppService]
    ) -> Response[Any]:
        """Refused: no model that is served ranks texts."""
        llamacpp.rerank(data)

    @post("/tokenize", status_code=200, responses=openai_responses(schema.TokenizeResponse, body=True))
    async def tokenize(
        self, data: SkipValidation[JSONBody[schema.TokenizeRequest]], llamacpp: NamedDependency[LlamaCppService]
    ) -> Response[Any]:
        """Splits text into tokens."""
        return json_response(await llamacpp.tokenize(parse(schema.TokenizeRequest, data)))

    @post("/detokenize", status_code=200, responses=openai_responses(schema.DetokenizeResponse, body=True))
    async def detokenize(
        self, data: SkipValidation[JSONBody[schema.DetokenizeRequest]], llamacpp: NamedDependency[LlamaCppService]
    ) -> Response[Any]:
        """Joins tokens into text."""
        return json_response(await llamacpp.detokenize(parse(schema.DetokenizeRequest, data)))

    @post("/apply-template", status_code=200, responses=openai_responses(schema.ApplyTemplateResponse, body=True))
    async def apply_template(
        self, data: SkipValidation[JSONBody[schema.ApplyTemplateRequest]], llamacpp: NamedDependency[LlamaCppService]
    ) -> Response[Any]:
        """Writes a conversation out as the model reads it."""
        return json_response(await llamacpp.apply_template(parse(schema.ApplyTemplateRequest, data)))

    @post(
        ["/embedding", "/embeddings"],
        status_code=200,
        responses=openai_responses(list[LlamaEmbedding], 404, 500, 501, 507, body=True),
    )
    async def embeddings(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[LlamaEmbeddingsRequest]],
        embeddings: NamedDependency[EmbeddingService],
    ) -> Response[Any]:
        """Embeds texts."""
        return await answer(request, data, embeddings.llamacpp)

    @get("/props", responses=openai_responses(schema.Props))
    async def props(self, llamacpp: NamedDependency[LlamaCppService]) -> Response[Any]:
        """The server's properties and sampling defaults."""
        return json_response(llamacpp.props())

    @get("/lora-adapters", responses=openai_responses(list[schema.LoraAdapter]))
    async def lora_adapters(self, llamacpp: NamedDependency[LlamaCppService]) -> Response[Any]:
        """The LoRA adapters, and the scales of requests that say nothing of them."""
        return json_response(msgspec.json.encode(llamacpp.lora()))

    @post("/lora-adapters", status_code=200, responses=openai_responses(schema.LoraChanged, body=True))
    async def set_lora_adapters(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[LoraScales]],
        llamacpp: NamedDependency[LlamaCppService],
    ) -> Response[Any]:
        """Changes those scales, 0 for an adapter that is not named; needs an admin key."""
        if not context_of(request).identity.admin:
            raise Forbidden("This key may not change the scales of LoRA adapters")
        return json_response(llamacpp.scale_lora(data))

    @get("/slots", responses=openai_responses(list[schema.Slot]))
    async def slots(self, request: HttpRequest, llamacpp: NamedDependency[LlamaCppService]) -> Response[Any]:
        """The decode slots, without any text; the counts are those of the caller's own requests."""
        return json_response(msgspec.json.encode(llamacpp.slots(context_of(request).identity.owner)))
