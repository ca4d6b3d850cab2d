"""`/v1/messages`: generation and counting for clients of Anthropic's API."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from server.errors import anthropic_error
from server.middleware.request_context import RequestContext
from server.schemas import messages as schema
from server.services import messages_api as api
from server.services.engine_supervisor import EngineSupervisor
from server.services.generation import Generation
from server.services.inference import Answering, Asked, Inference
from server.services.models import Models
from server.services.response_builder import new_id
from server.services.tokenization import Tokenization
from server.services.unsupported import refuse_unsupported
from server.services.wire import Wire, named_event
from server.validation import parse

C = TypeVar("C", bound=schema.CountRequest)
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class MessagesService:
    """The Messages API."""

    def __init__(
        self, *, inference: Inference, supervisor: EngineSupervisor, tokenization: Tokenization, models: Models
    ) -> None:
        self._inference, self._supervisor = inference, supervisor
        self._tokenization, self._models = tokenization, models

    async def create(self, raw: Any, context: RequestContext) -> Generation:
        """Starts a message."""
        body = _parse(schema.MessagesRequest, raw)

        def answering(asked: Asked) -> Answering:
            builder = api.MessageBuilder(
                new_id("msg"), model=asked.model, prompt_tokens=asked.prompt_tokens, reader=asked.reader
            )
            return Answering(
                builder=builder,
                wire=Wire(frame=named_event, error=anthropic_error, opening=builder.opening, ping=_PING),
                field="messages",
            )

        tools, shape = api.chosen_tools(body), api.answer_shape(body)
        return await self._inference.converse(api.chat_request(body), context, answering, tools=tools, shape=shape)

    async def count(self, raw: Any, context: RequestContext) -> bytes:
        """The answer of `POST /v1/messages/count_tokens`."""
        body = _parse(schema.CountRequest, raw)
        _ = self._supervisor.accepting
        self._models.resolve(body.model)
        tools = api.chosen_tools(body)
        ids = await self._tokenization.chat(
            api.conversation(body), api.template_variables(body), () if tools is None else tools.told
        )
        return msgspec.json.encode(schema.TokenCount(input_tokens=len(ids)))


def _parse(kind: type[C], raw: Any) -> C:
    body = parse(kind, raw)
    refuse_unsupported(raw, kind)
    api.refuse(body)
    return body
