"""Texts to embeddings: one engine request a text, and all vectors written at once."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
import numpy as np

from atlas_jax.engine.api import Pooling, SamplingParams
from server.errors import ContextExceeded, NotSupported
from server.middleware.request_context import PARTY, RequestContext
from server.schemas import embeddings as schema
from server.schemas.usage import Usage
from server.services.generation import Generator
from server.services.generation_plan import GenerationPlan
from server.services.memory_options import MemoryPlan
from server.services.models import Models
from server.services.response_builder import Ending, Outcome
from server.services.runtime_config import RuntimeConfig
from server.services.thread_pools import ThreadPools
from server.services.tokenization import Tokenization
from server.services.unsupported import refuse_unsupported
from server.validation import invalid, parse

MAX_TEXTS = 2048
MAX_TOKENS = 300_000
"""Of all texts of one request, both as OpenAI has them."""
# Numbers that are written in about a millisecond; more go to a thread.
_INLINE_NUMBERS = 8192


class EmbeddingService:
    """Embeds texts with the model that is served."""

    def __init__(
        self,
        *,
        generator: Generator,
        tokenization: Tokenization,
        models: Models,
        config: RuntimeConfig,
        pools: ThreadPools,
    ) -> None:
        self._generator, self._supervisor = generator, generator.supervisor
        self._tokenization, self._models, self._config, self._pools = tokenization, models, config, pools

    async def openai(self, raw: Any, context: RequestContext) -> bytes:
        """The answer of `POST /v1/embeddings`."""
        body = parse(schema.EmbeddingsRequest, raw)
        refuse_unsupported(raw, schema.EmbeddingsRequest)
        model, vectors, tokens = await self.vectors(
            body.input, "input", context, model=body.model, dimensions=body.dimensions
        )

        def made(rows: Sequence[Any]) -> schema.Embeddings:
            return schema.Embeddings(
                data=[schema.Embedding(index=index, embedding=row) for index, row in enumerate(rows)],
                model=model,
                usage=schema.EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
            )

        return await self.written(vectors, made, write=_base64 if body.encoding_format == "base64" else _numbers)

    async def llamacpp(self, raw: Any, context: RequestContext) -> bytes:
        """The answer of llama.cpp's `POST /embedding`."""
        body = parse(schema.LlamaEmbeddingsRequest, raw)
        refuse_unsupported(raw, schema.LlamaEmbeddingsRequest)
        given, field = (body.content, "content") if body.input is None else (body.input, "input")
        if given is None:
            raise invalid("content", "required field is missing")
        if body.content is not None and body.input is not None:
            raise invalid("content", "cannot be combined with input")
        _, vectors, _ = await self.vectors(given, field, context, model=body.model)
        return await self.written(
            vectors,
            lambda rows: [schema.LlamaEmbedding(index=index, embedding=[row]) for index, row in enumerate(rows)],
        )

    async def vectors(
        self,
        given: schema.Texts,
        field: str,
        context: RequestContext,
        *,
        model: str | None,
        dimensions: int | None = None,
    ) -> tuple[str, np.ndarray, int]:
        """The model's name, a row of length 1 for every text, and how many tokens the texts have.

        Args:
          field: what the client calls the texts, for errors.
          dimensions: how many of a row's first numbers are wanted; None is all.
        """
        name, size = self._ready(model), self._supervisor.engine.model.embedding_size
        if dimensions is not None and dimensions > size:
            raise invalid("dimensions", f"value must be at most {size}, this model's")
        vectors, tokens = await self._embed(given, field, context)
        return name, vectors if dimensions is None else normalised(vectors[:, :dimensions]), tokens

    def _ready(self, name: str | None) -> str:
        """The model's name, once it is sure that admission does not refuse the request at once."""
        _ = self._supervisor.accepting
        model = self._models.resolve(name)
        self._generator.admission.check(PARTY.get())
        return model

    async def _embed(self, given: schema.Texts, field: str, context: RequestContext) -> tuple[np.ndarray, int]:
        """A row for every text, and how many tokens they have."""
        pooling = self._supervisor.engine.model.pooling
        if pooling is None:
            raise NotSupported(
                "This model's file asks for a kind of pooling that is not supported; --pooling names one"
            )
        prompts = await self._tokenization.texts(given, field, most=MAX_TEXTS)
        tokens = sum(map(len, prompts))
        if tokens > MAX_TOKENS:
            raise invalid(field, f"must have at most {MAX_TOKENS} tokens in all, has {tokens}")
        try:
            generation = await self._generator.start(self._plan(prompts, pooling, field), context)
            outcomes = await generation.outcomes()
        except ContextExceeded as error:
            if len(prompts) > 1:
                longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
                error.param = f"{field}[{longest}]"
            raise
        generation.complete()
        return np.stack([cast(np.ndarray, outcome.embedding) for outcome in outcomes]), tokens

    def _plan(self, prompts: Sequence[Sequence[int]], pooling: Pooling, field: str) -> GenerationPlan:
        return GenerationPlan(
            prompts=prompts,
            choices=1,
            sampling=SamplingParams(),
            max_tokens=0,
            stop=(),
            ignore_eos=False,
            reuse=False,
            grammar=None,
            prompt_logprobs=None,
            memory=MemoryPlan(params=None, batch_size=self._config.values.batch_size),
            stream=False,
            include_usage=False,
            builder=_NoText(),
            pooling=pooling,
            field=field,
        )

    async def written(
        self,
        vectors: np.ndarray,
        made: Callable[[list[Any]], Any],
        *,
        write: Callable[[np.ndarray], Any] | None = None,
    ) -> bytes:
        """The JSON that `made` makes of the rows, each as `write` writes it; numbers by default."""
        one = write or _numbers

        def encoded() -> bytes:
            return msgspec.json.encode(made([one(row) for row in vectors]))

        return encoded() if vectors.size <= _INLINE_NUMBERS else await self._pools.run("bodies", encoded)


class _NoText:
    """The builder of a request that answers no text."""

    def chunks(self, index: int, event: Any) -> Sequence[msgspec.Struct]:
        return ()

    def end(self, index: int, reason: Any, ending: Ending | None) -> Sequence[msgspec.Struct]:
        return ()

    def usage(self, usage: Usage) -> msgspec.Struct:
        raise AssertionError("embeddings are not streamed")

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        raise AssertionError("embeddings are written by the service")


def normalised(vectors: np.ndarray) -> np.ndarray:
    """The rows at length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def _numbers(row: np.ndarray) -> msgspec.Raw:
    # row by row: one call that writes all would hold the interpreter, whichever thread it is in
    return msgspec.Raw(msgspec.json.encode(row.tolist()))


def _base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
