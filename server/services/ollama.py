"""Ollama's API: generation, embeddings and the models."""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

from atlas_jax import __version__
from server.errors import ollama_error
from server.middleware.request_context import RequestContext
from server.schemas import ollama as schema
from server.services import ollama_api as api
from server.services.embeddings import EmbeddingService
from server.services.engine_supervisor import EngineSupervisor
from server.services.generation import Generation
from server.services.inference import Answering, Asked, Inference
from server.services.models import Models
from server.services.unsupported import refuse_unsupported
from server.services.wire import Wire, line
from server.validation import invalid, parse

_WIRE = Wire(frame=line, error=ollama_error, ping=b"", media_type="application/x-ndjson")
_NEVER = "9999-12-31T23:59:59Z"


class OllamaService:
    """What Ollama's clients ask."""

    def __init__(
        self, *, inference: Inference, embeddings: EmbeddingService, supervisor: EngineSupervisor, models: Models
    ) -> None:
        self._inference, self._embeddings = inference, embeddings
        self._supervisor, self._models = supervisor, models

    async def chat(self, raw: Any, context: RequestContext) -> Generation | bytes:
        """Starts the answer to a conversation; an empty one only asks whether the model is there."""
        body = parse(schema.OllamaChatRequest, raw)
        self._check(raw, body)
        if not body.messages:
            return self._loaded("chat", body.model)
        return await self._inference.converse(
            api.chat_request(body),
            context,
            _answering("chat", "messages"),
            tools=api.chosen_tools(body),
            shape=api.answer_shape(body),
        )

    async def generate(self, raw: Any, context: RequestContext) -> Generation | bytes:
        """Starts the answer to a question, with `raw` the continuation of a text, with `suffix` what fills a gap."""
        body = parse(schema.OllamaGenerateRequest, raw)
        self._check(raw, body)
        if not body.prompt:
            return self._loaded("generate", body.model)
        answering = _answering("generate", "prompt")
        if body.raw or body.suffix:
            return await self._inference.complete(api.completion_request(body), context, answering)
        return await self._inference.converse(api.chat_request(body), context, answering, shape=api.answer_shape(body))

    async def embed(self, raw: Any, context: RequestContext) -> bytes:
        """The answer of `POST /api/embed`."""
        began, body = time.perf_counter(), parse(schema.OllamaEmbedRequest, raw)
        refuse_unsupported(raw, schema.OllamaEmbedRequest)
        model, vectors, tokens = await self._embeddings.vectors(
            body.input, "input", context, model=api.plain_name(body.model), dimensions=body.dimensions
        )
        return await self._embeddings.written(
            vectors,
            lambda rows: schema.OllamaEmbedded(
                model=model + api.LATEST,
                embeddings=rows,
                total_duration=int((time.perf_counter() - began) * 1e9),
                load_duration=0,
                prompt_eval_count=tokens,
            ),
        )

    async def embed_one(self, raw: Any, context: RequestContext) -> bytes:
        """The answer of `POST /api/embeddings`."""
        body = parse(schema.OllamaEmbeddingsRequest, raw)
        refuse_unsupported(raw, schema.OllamaEmbeddingsRequest)
        _, vectors, _ = await self._embeddings.vectors(
            body.prompt, "prompt", context, model=api.plain_name(body.model), dimensions=None
        )
        return await self._embeddings.written(vectors, lambda rows: schema.OllamaEmbedding(embedding=rows[0]))

    def tags(self) -> schema.OllamaModels:
        """Every name of the model."""
        model = self._supervisor.engine.model
        modified = api.timestamp(model.created)
        return schema.OllamaModels(
            models=[api.described(name, model, modified_at=modified) for name in self._models.names]
        )

    def running(self) -> schema.OllamaModels:
        """The model, which is always loaded."""
        model = self._supervisor.engine.model
        return schema.OllamaModels(models=[api.described(self._models.names[0], model, expires_at=_NEVER, size_vram=0)])

    def show(self, raw: Any) -> schema.OllamaShown:
        """The model, described."""
        body = parse(schema.OllamaShowRequest, raw)
        name = body.model or body.name
        if not name:
            raise invalid("model", "required field is missing")
        self._models.resolve(api.plain_name(name))
        engine = self._supervisor.engine
        return api.shown(engine.model, thinks=engine.template.thinks)

    def version(self) -> schema.OllamaVersion:
        """The server's version."""
        return schema.OllamaVersion(version=__version__)

    def _check(self, raw: Any, body: schema.OllamaChatRequest | schema.OllamaGenerateRequest) -> None:
        refuse_unsupported(raw, type(body))
        api.refuse(body)
        api.check_thinking(body, thinks=self._supervisor.engine.template.thinks)

    def _loaded(self, kind: Literal["chat", "generate"], name: str) -> bytes:
        _ = self._supervisor.accepting
        return msgspec.json.encode(api.OllamaBuilder(kind, self._models.resolve(api.plain_name(name))).loaded())


def _answering(kind: Literal["chat", "generate"], field: str) -> Any:
    def answering(asked: Asked) -> Answering:
        return Answering(builder=api.OllamaBuilder(kind, asked.model, reader=asked.reader), wire=_WIRE, field=field)

    return answering
