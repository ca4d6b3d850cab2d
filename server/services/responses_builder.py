"""The response object of the Responses API, and the events of its stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from atlas_jax.engine.api import Delta, Prompt, TokenInfo
from server.errors import Problem
from server.schemas import response_events as events
from server.schemas import responses as schema
from server.schemas.usage import Usage
from server.services.chat_response import token_logprobs
from server.services.response_builder import Ending, FinishReason, Outcome, finish_reason, new_id
from server.tool_calls.answer import AnswerReader
from server.tool_calls.parts import Change, Closed, Grown, Opened, Part, Parts

_PREFIXES = {"text": "msg", "call": "fc", "reasoning": "rs"}


class ResponsesBuilder:
    """The response object and the events of its stream.

    Every part of an answer is an item. Log-probabilities are those of the tokens that came since the last part that was no
    text.

    Args:
      logprobs: whether the request asked for them.
      summaries: whether reasoning is given as a summary, which is all of it.
      reader: makes what tells reasoning and calls from the rest.
      namespaces: whose namespace functions are in, by their names.

    Attributes:
      response: as it is now; complete once `end` or `whole` has been called.
    """

    def __init__(
        self,
        response: schema.ResponseObject,
        *,
        logprobs: bool,
        summaries: bool = False,
        reader: Callable[[], AnswerReader] = AnswerReader,
        namespaces: Mapping[str, str] | None = None,
    ) -> None:
        self.response = response
        self._wants, self._summaries = logprobs, summaries
        self._namespaces = namespaces or {}
        self._parts = Parts(reader())
        self._ids: list[str] = []
        self._tokens: list[TokenInfo] = []  # whose text has not come out yet
        self._logprobs: dict[int, list[Any]] = {}
        self._sequence = -1
        self._ended = False

    def opening(self) -> Sequence[msgspec.Struct]:
        """What a stream begins with."""
        return [
            events.ResponseEvent(type="response.created", sequence_number=self._next(), response=self.response),
            events.ResponseEvent(type="response.in_progress", sequence_number=self._next(), response=self.response),
        ]

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """Events for new text."""
        if not isinstance(event, Delta):
            return ()
        self._tokens += event.tokens
        return self._events(self._parts.push(event.text))

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """Events that finish the answer."""
        assert ending is not None
        self._ended = True
        out = self._events(self._parts.finish(cut=reason == "length"))
        self._finish(reason, ending)
        kind: Any = "response.incomplete" if self.response.status == "incomplete" else "response.completed"
        return [*out, events.ResponseEvent(type=kind, sequence_number=self._next(), response=self.response)]

    def usage(self, usage: Usage) -> msgspec.Struct:
        """Never asked for: counts are in the response."""
        raise AssertionError("responses have no chunk of usage")

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        """The response."""
        (outcome,) = outcomes
        assert outcome.finished is not None
        for delta in outcome.deltas:
            self.chunks(0, delta)
        self.end(0, finish_reason(outcome.finished), ending)
        return self.response

    def failed(self, found: Problem) -> msgspec.Struct:
        """The event a stream ends with that has failed."""
        code = "rate_limit_exceeded" if found.status == 429 else "server_error"
        failed = msgspec.structs.replace(
            self.response, status="failed", output=[], error=schema.ResponseError(code=code, message=found.message)
        )
        return events.ResponseEvent(type="response.failed", sequence_number=self._next(), response=failed)

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    # --- items ----------------------------------------------------------------------------------------------------
    def _item(self, part: Part, status: schema.ItemStatus, *, empty: bool = False) -> schema.OutputItem:
        id_ = self._ids[part.index]
        if part.kind == "call":
            arguments = "" if empty else part.text
            return schema.FunctionCallItem(
                id=id_,
                call_id=part.id,
                name=part.name,
                arguments=arguments,
                namespace=self._namespaces.get(part.name, msgspec.UNSET),
                status=status,
            )
        if part.kind == "reasoning":
            return schema.ReasoningItem(
                id=id_,
                summary=[schema.SummaryText(text=part.text)] if self._summaries and not empty else [],
                content=[schema.ReasoningText(text=part.text)] if not (self._summaries or empty) else [],
                status=status,
            )
        content: list[Any] = [] if empty else [self._text(part)]
        return schema.MessageItem(id=id_, role="assistant", content=content, status=status)

    def _text(self, part: Part) -> schema.OutputText:
        return schema.OutputText(text=part.text, logprobs=self._logprobs.get(part.index, []))

    def _events(self, changes: Sequence[Change]) -> list[msgspec.Struct]:
        out: list[msgspec.Struct] = []
        for change in changes:
            part = change.part
            match change:
                case Opened():
                    self._ids.append(new_id(_PREFIXES[part.kind]))
                    item = self._item(part, "in_progress", empty=True)
                    out.append(self._item_event("added", part, item))
                    out += self._text_begins(part)
                case Grown(_, text):
                    out.append(self._grows(part, text))
                case Closed():
                    if self._ended and self._wants and part.kind == "text":  # tokens of no text of their own
                        self._logprobs.setdefault(part.index, []).extend(token_logprobs(self._tokens))
                    out += self._text_ends(part)
                    item = self._item(part, "completed" if part.whole else "incomplete")
                    out.append(self._item_event("done", part, item))
        return out

    def _item_event(self, what: Literal["added", "done"], part: Part, item: schema.OutputItem) -> msgspec.Struct:
        kind: Any = f"response.output_item.{what}"
        return events.OutputItemEvent(type=kind, sequence_number=self._next(), output_index=part.index, item=item)

    def _place(self, part: Part, index: str = "content_index") -> dict[str, Any]:
        place = {"sequence_number": self._next(), "item_id": self._ids[part.index], "output_index": part.index}
        return place if part.kind == "call" else {**place, index: 0}

    def _text_begins(self, part: Part) -> list[msgspec.Struct]:
        return [] if part.kind == "call" else [self._part_event("added", part, "")]

    def _part_event(self, what: Literal["added", "done"], part: Part, text: str) -> msgspec.Struct:
        if part.kind == "reasoning" and self._summaries:
            summary: Any = f"response.reasoning_summary_part.{what}"
            return events.SummaryPartEvent(
                type=summary, part=schema.SummaryText(text=text), **self._place(part, "summary_index")
            )
        kind: Any = f"response.content_part.{what}"
        shown: schema.OutputText | schema.ReasoningText
        if part.kind == "reasoning":
            shown = schema.ReasoningText(text=text)
        else:
            shown = self._text(part) if text else schema.OutputText(text="")
        return events.ContentPartEvent(type=kind, part=shown, **self._place(part))

    def _grows(self, part: Part, text: str) -> msgspec.Struct:
        tokens, self._tokens = self._tokens, []
        if part.kind == "call":
            return events.ArgumentsDeltaEvent(delta=text, **self._place(part))
        if part.kind == "reasoning" and self._summaries:
            return events.SummaryDeltaEvent(delta=text, **self._place(part, "summary_index"))
        if part.kind == "reasoning":
            return events.ReasoningDeltaEvent(delta=text, **self._place(part))
        found = token_logprobs(tokens) if self._wants else []
        self._logprobs.setdefault(part.index, []).extend(found)
        return events.TextDeltaEvent(delta=text, logprobs=found, **self._place(part))

    def _text_ends(self, part: Part) -> list[msgspec.Struct]:
        if part.kind == "call":
            return [events.ArgumentsDoneEvent(name=part.name, arguments=part.text, **self._place(part))]
        done: msgspec.Struct
        if part.kind == "reasoning" and self._summaries:
            done = events.SummaryDoneEvent(text=part.text, **self._place(part, "summary_index"))
        elif part.kind == "reasoning":
            done = events.ReasoningDoneEvent(text=part.text, **self._place(part))
        else:
            text = self._text(part)
            done = events.TextDoneEvent(text=text.text, logprobs=text.logprobs, **self._place(part))
        return [done, self._part_event("done", part, part.text)]

    def _finish(self, reason: FinishReason, ending: Ending) -> None:
        cut = reason == "length"
        usage = ending.usage
        self.response = msgspec.structs.replace(
            self.response,
            status="incomplete" if cut else "completed",
            completed_at=None if cut else time.time(),
            incomplete_details=schema.IncompleteDetails(reason="max_output_tokens") if cut else None,
            output=[self._item(part, "completed" if part.whole else "incomplete") for part in self._parts.found],
            usage=schema.ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=schema.InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=schema.OutputTokensDetails(),
                total_tokens=usage.total_tokens,
            ),
            timings=ending.timings,
            atlas_stats=ending.atlas_stats,
        )


def begun(
    body: schema.ResponsesRequest, *, response_id: str, model: str, temperature: float, top_p: float, store: bool
) -> schema.ResponseObject:
    """The response of a request that has just been accepted."""
    conversation, reasoning = body.conversation, body.reasoning or schema.ReasoningOptions()
    return schema.ResponseObject(
        id=response_id,
        created_at=float(int(time.time())),
        status="in_progress",
        model=model,
        output=[],
        temperature=temperature,
        top_p=top_p,
        text={"format": (body.text.format if body.text is not None else None) or {"type": "text"}},
        store=store,
        conversation=schema.ConversationRef(id=conversation) if isinstance(conversation, str) else conversation,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=schema.ReasoningEcho(
            effort=reasoning.effort, summary=reasoning.summary or reasoning.generate_summary
        ),
        safety_identifier=body.safety_identifier,
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=[one for one in body.tools or () if one.type in ("function", "namespace")],
        top_logprobs=body.top_logprobs or 0,
        truncation=body.truncation or "disabled",
        user=body.user,
    )
