"""`/v1/responses`: generation on top of what is kept, and reading and deleting that.

The text that is kept says what a response was asked and answered. Sessions make going on from it cheap, and reach beyond the
window; where one is lost, the text is read anew. So a request brings the whole conversation to its session.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from server.config.settings import SamplingSection, Settings
from server.errors import BadRequest
from server.middleware.request_context import RequestContext
from server.schemas import responses as schema
from server.schemas.atlas import AtlasOptions
from server.services import responses_api as api
from server.services.conversation_store import ConversationStore, conversation_not_found
from server.services.engine_supervisor import EngineSupervisor
from server.services.generation import Generation
from server.services.inference import Answering, Asked, Inference
from server.services.item_pages import ItemPage
from server.services.memory_options import check_name
from server.services.response_builder import new_id
from server.services.response_sessions import ResponseSessions
from server.services.response_store import Node, Record, ResponseStore, response_not_found
from server.services.responses_builder import ResponsesBuilder, begun
from server.services.sampling import default_sampling
from server.services.tokenization import Tokenization
from server.services.unsupported import effort_variables, refuse_unsupported
from server.services.wire import Wire, named_event
from server.validation import invalid, parse, unsupported


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a response goes.

    Attributes:
      before: what came before, from the beginning.
      session: the name of its lane's session.
      uses_session: whether it is generated in that session: what follows nothing is not.
    """

    before: list[Record]
    session: str
    uses_session: bool

    @property
    def parent(self) -> str | None:
        return self.before[-1].id if self.before else None


class ResponsesService:
    """The Responses API."""

    def __init__(
        self,
        *,
        inference: Inference,
        supervisor: EngineSupervisor,
        tokenization: Tokenization,
        store: ResponseStore,
        conversations: ConversationStore,
        sessions: ResponseSessions,
        settings: Settings,
    ) -> None:
        self._inference, self._supervisor, self._tokenization = inference, supervisor, tokenization
        self._store, self._conversations, self._sessions = store, conversations, sessions
        self._sampling: SamplingSection = settings.sampling
        # responses that another one is going on from just now in their lane
        self._claimed: set[tuple[str, str]] = set()

    # --- creating -------------------------------------------------------------------------------------------------
    async def create(self, raw: Any, context: RequestContext) -> Generation:
        """Starts a response."""
        body = self._parse(raw, context)
        items, tools, shape = api.input_items(body.input), api.chosen_tools(body), api.answer_shape(body)
        owner, store, response_id = context.identity.owner, body.store is not False, new_id(api.RESPONSE)
        kept: list[str] = []
        context.cleanup.append(lambda: None if kept else self._sessions.abandon(owner, response_id))
        place = await self._place(body, response_id, context)
        said = [item for record in place.before for item in record.items]
        api.check_outputs(said, items)
        conversation = api.messages(body.instructions, (*said, *items))
        chat = api.chat_request(body, conversation, self._atlas(body, place, store=store))

        def answering(asked: Asked) -> Answering:
            default = default_sampling(self._sampling, self._supervisor.engine.model.sampling)
            response = begun(
                body,
                response_id=response_id,
                model=asked.model,
                temperature=default.temperature if body.temperature is None else body.temperature,
                top_p=default.top_p if body.top_p is None else body.top_p,
                store=store,
            )
            builder = ResponsesBuilder(
                response,
                logprobs=bool(chat.logprobs),
                summaries=response.reasoning.summary is not None,
                reader=asked.reader,
                namespaces=api.namespaces(body),
            )

            async def keep() -> None:
                record = Record(
                    id=response_id,
                    parent=place.parent,
                    session=place.session,
                    input=items,
                    output=builder.response.output,
                    response=msgspec.Raw(msgspec.json.encode(builder.response)),
                )
                if response.conversation is not None:
                    await self._conversations.begin(owner, response.conversation.id)
                await self._store.add(owner, record)
                kept.append(response_id)

            return Answering(
                builder=builder,
                wire=Wire(frame=named_event, error=builder.failed, opening=builder.opening),
                commit=keep if store else None,
                field="input",
            )

        return await self._inference.converse(chat, context, answering, tools=tools, shape=shape, whole=True)

    async def count(self, raw: Any, context: RequestContext) -> bytes:
        """The answer of `POST /v1/responses/input_tokens`."""
        body = self._parse(raw, context)
        items = api.input_items(body.input)
        node = await self._before(body, context.identity.owner)
        before = [] if node is None else await self._store.chain(context.identity.owner, node)
        said = [item for record in before for item in record.items]
        api.check_outputs(said, items)
        conversation = api.messages(body.instructions, (*said, *items))
        tools = api.chosen_tools(body)
        variables = None if body.reasoning is None else effort_variables(body.reasoning.effort)
        ids = await self._tokenization.chat(conversation, variables, () if tools is None else tools.told)
        return msgspec.json.encode(schema.InputTokens(input_tokens=len(ids)))

    def _parse(self, raw: Any, context: RequestContext) -> schema.ResponsesRequest:
        body = parse(schema.ResponsesRequest, raw)
        refuse_unsupported(raw, schema.ResponsesRequest)
        api.refuse(body)
        named = "X-Session-ID" if context.session is not None else None
        if body.atlas is not None and body.atlas.session_id is not None:
            named = "atlas.session_id"
        if named is not None:
            raise invalid(named, "previous_response_id and conversation name the sessions of responses")
        return body

    async def _place(self, body: schema.ResponsesRequest, response_id: str, context: RequestContext) -> _Place:
        owner, store = context.identity.owner, body.store is not False
        conversation = _conversation(body)
        if conversation is not None and store:
            await self._sessions.lock(owner, conversation, context)
        node = await self._before(body, owner)
        before = [] if node is None else await self._store.chain(owner, node)
        if conversation is not None:
            return _Place(before=before, session=conversation, uses_session=True)
        if node is None:
            return _Place(before=[], session=response_id, uses_session=False)
        session = before[-1].session
        if not store:
            return _Place(before=before, session=session, uses_session=True)
        claim = owner, node.id
        in_conversation = not session.startswith(f"{api.RESPONSE}_")  # which goes on without this response
        if (
            not in_conversation
            and claim not in self._claimed
            and await self._store.is_last(owner, node)
            and claim not in self._claimed
        ):
            self._claimed.add(claim)
            context.cleanup.append(lambda: self._claimed.discard(claim))
            return _Place(before=before, session=session, uses_session=True)
        await self._sessions.fork(owner, session, response_id)
        return _Place(before=before, session=response_id, uses_session=True)

    async def _before(self, body: schema.ResponsesRequest, owner: str) -> Node | None:
        """The response that a request follows, None where it begins."""
        conversation = _conversation(body)
        if conversation is not None:
            if conversation.startswith("conv_") and await self._conversations.find(owner, conversation) is None:
                raise conversation_not_found(conversation, param="conversation")
            return await self._store.last_of(owner, conversation)
        if body.previous_response_id is None:
            return None
        node = await self._store.find(owner, body.previous_response_id)
        if node is None:
            raise BadRequest(
                f"Previous response with id '{body.previous_response_id[:64]}' not found",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return node

    def _atlas(self, body: schema.ResponsesRequest, place: _Place, *, store: bool) -> AtlasOptions | None:
        """What the request does with its session; the plain model where it has none."""
        given = body.atlas
        if not (place.uses_session and self._sessions.there) or getattr(given, "enabled", None) is False:
            return given
        more: dict[str, Any] = {"session_id": place.session}
        if not store:
            more["write"] = False
        return msgspec.structs.replace(given or AtlasOptions(), **more)

    # --- what is kept ---------------------------------------------------------------------------------------------
    async def retrieve(self, owner: str, response_id: str, query: Mapping[str, str]) -> bytes:
        """A response as it was sent."""
        if query.get("stream", "").lower() in ("true", "1"):
            raise unsupported("stream")
        return bytes((await self._store.read(owner, await self._node(owner, response_id))).response)

    async def delete(self, owner: str, response_id: str) -> bytes:
        """Removes a response, and its session where no other response is in it."""
        session = await self._store.delete(owner, await self._node(owner, response_id))
        if session is not None:
            await self._sessions.delete(owner, session)
        return msgspec.json.encode(schema.DeletedResponse(id=response_id))

    async def cancel(self, owner: str, response_id: str) -> bytes:
        """Refused: only responses in the background can be cancelled, and there are none."""
        await self._node(owner, response_id)
        raise BadRequest(
            "Only a response that was created with background can be cancelled; close the connection to end this one",
            param="response_id",
            code="unsupported_parameter",
        )

    async def items(self, owner: str, response_id: str, query: Mapping[str, str]) -> bytes:
        """One page of what a response was asked."""
        page = ItemPage.parse(query)
        record = await self._store.read(owner, await self._node(owner, response_id))
        return page.of(record.input)

    async def _node(self, owner: str, response_id: str) -> Node:
        node = await self._store.find(owner, response_id)
        if node is None:
            raise response_not_found(response_id, param="response_id")
        return node


def _conversation(body: schema.ResponsesRequest) -> str | None:
    given = body.conversation
    if given is None:
        return None
    name = check_name(given if isinstance(given, str) else given.id, "conversation")
    if name.startswith(f"{api.RESPONSE}_"):
        raise invalid("conversation", f"must not begin with '{api.RESPONSE}_', as responses do")
    return name
