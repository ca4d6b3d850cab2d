"""OpenAI's Responses API in words of chat completions: requests, the items of a conversation, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from atlas_jax.engine.api import AnswerShape
from server.errors import BadRequest
from server.schemas import responses as schema
from server.schemas.chat import ChatMessage, ChatRequest, ContentPart, FunctionCall, FunctionDefinition, ToolCall
from server.services.answer_shape import format_shape
from server.services.response_builder import new_id
from server.tool_calls.choice import CHOICES, Choice, Function, Tools, choose, functions_of
from server.validation import invalid, unsupported

RESPONSE = "resp"
"""How ids of responses begin, and the sessions that belong to them."""
LOGPROBS = "message.output_text.logprobs"
# What may be included besides; the server has none of it, or (the last two) leaves nothing out.
_INCLUDED = (
    *("file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
    *("message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs"),
    *("reasoning.encrypted_content", LOGPROBS),
)
_ROLES = ("user", "assistant", "system", "developer")
# A tool of the server's own that agents offer with every request (Codex does unless it is told not to). The model may use it
# and never does, as if it saw no reason to; a choice that asks for it is refused.
_SEARCH = "web_search"
_TEXTS = ("text", "input_text", "output_text")
# What a request may share with a chat completion, as it is.
_SHARED = (
    *("model", "temperature", "top_p", "top_k", "min_p", "typical_p", "repeat_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "seed", "stop", "stream", "ignore_eos", "cache_prompt", "user", "lora"),
)


# --- requests ---------------------------------------------------------------------------------------------------------
def refuse(body: schema.ResponsesRequest) -> None:
    """Refuses what would change the answer and is not there; raises BadRequest by name."""
    if body.background:
        raise unsupported("background")
    for name in ("max_tokens", "n_predict"):
        if getattr(body, name) is not None:
            raise invalid(name, "unknown field; did you mean 'max_output_tokens'?", code="unknown_field")
    if body.n not in (None, 1):
        raise unsupported("n")
    if body.previous_response_id is not None and body.conversation is not None:
        raise invalid("previous_response_id", "cannot be combined with conversation")
    check_included(body.include or ())
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise invalid("top_logprobs", f"needs '{LOGPROBS}' in include")


def check_included(names: Iterable[str]) -> None:
    """Raises BadRequest for what nothing can be included of."""
    for index, name in enumerate(names):
        if name not in _INCLUDED:
            raise invalid(f"include[{index}]", f"value must be one of {', '.join(_INCLUDED)}")


def chosen_tools(body: schema.ResponsesRequest) -> Tools | None:
    """The functions of a request, as `choose`; raises BadRequest."""
    functions, choice = functions_told(body), body.tool_choice
    match choice:
        case schema.NamedFunction(name=name):
            chosen = Choice(names=[(name, "tool_choice.name")], forced=True, single=True)
        case schema.AllowedFunctions(tools=some, mode=mode):
            names = [(one.name, f"tool_choice.tools[{at}].name") for at, one in enumerate(some)]
            chosen = Choice(names=names, forced=mode == "required")
        case _:
            chosen = CHOICES[choice]
    return choose(functions, chosen, field="tools", parallel=body.parallel_tool_calls is not False)


def functions_told(body: schema.ResponsesRequest) -> tuple[Function, ...]:
    """The functions the model is told of; raises BadRequest for other tools, unless none may be called."""
    given = []
    for index, one in enumerate(body.tools or ()):
        for tool, field in _in_namespace(one, f"tools[{index}]"):
            if tool.type != "function":
                free = body.tool_choice in (None, "auto")
                if body.tool_choice == "none" or (free and tool.type.startswith(_SEARCH)):
                    continue
                raise BadRequest(
                    f"Tools of type '{tool.type[:64]}' are not supported",
                    param=f"{field}.type",
                    code="unsupported_tool",
                )
            if tool.name is None:
                raise invalid(f"{field}.name", "required field is missing")
            definition = FunctionDefinition(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            )
            given.append((definition, field, f"{field}.parameters"))
    return functions_of(given)


def _in_namespace(
    tool: schema.FunctionTool, field: str
) -> list[tuple[schema.FunctionTool | schema.NamespacedTool, str]]:
    """The tools of a namespace, or the tool itself, and where they stand."""
    if tool.type != "namespace":
        return [(tool, field)]
    return [(one, f"{field}.tools[{at}]") for at, one in enumerate(tool.tools or ())]


def namespaces(body: schema.ResponsesRequest) -> dict[str, str]:
    """Whose namespace functions are in, by their names."""
    spaces = [tool for tool in body.tools or () if tool.type == "namespace"]
    return {one.name: space.name for space in spaces if space.name is not None for one in space.tools or ()}


def answer_shape(body: schema.ResponsesRequest) -> AnswerShape | None:
    """What `text.format` demands; raises BadRequest."""
    given = None if body.text is None else body.text.format
    if given and given.get("type") == "json_schema" and not isinstance(given.get("schema"), dict):
        raise invalid("text.format.schema", "must be an object")
    return format_shape(given, "text.format")


def chat_request(body: schema.ResponsesRequest, conversation: list[ChatMessage], atlas: Any) -> ChatRequest:
    """The same request as a chat completion."""
    wants = LOGPROBS in (body.include or ())
    return ChatRequest(
        messages=conversation,
        max_completion_tokens=body.max_output_tokens,
        logprobs=wants,
        top_logprobs=body.top_logprobs if wants else None,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        atlas=atlas,
        **{name: getattr(body, name) for name in _SHARED},
    )


# --- items ------------------------------------------------------------------------------------------------------------
def input_items(given: str | Sequence[schema.InputItem] | None, field: str = "input") -> list[schema.Item]:
    """The items of a request's input as they are kept; raises BadRequest."""
    if given is None:
        raise invalid(field, "required field is missing")
    if isinstance(given, str):
        given = [schema.InputItem(role="user", content=given)]
    out = [made for index, item in enumerate(given) if (made := _item(item, f"{field}[{index}]")) is not None]
    if not out:
        raise invalid(field, "must have at least one message")
    return out


def _item(item: schema.InputItem, field: str) -> schema.Item | None:
    match item.type:
        case "message":
            return _message_item(item, field)
        case "function_call":
            return schema.FunctionCallItem(
                id=new_id("fc"),
                call_id=_given(item.call_id, f"{field}.call_id"),
                name=_given(item.name, f"{field}.name"),
                arguments=_given(item.arguments, f"{field}.arguments"),
            )
        case "function_call_output":
            output = _given(item.output, f"{field}.output")
            if not isinstance(output, str):
                output = [schema.InputText(text=text) for text in _texts(output, f"{field}.output")]
            return schema.FunctionOutputItem(
                id=new_id("fco"), call_id=_given(item.call_id, f"{field}.call_id"), output=output
            )
        case "reasoning":
            said = "".join(part.text or "" for part in (item.content if isinstance(item.content, list) else ()))
            summary = [schema.SummaryText(text=part.text or "") for part in item.summary or ()]
            if not (said or any(part.text for part in summary)):  # sealed, by a model elsewhere
                return None
            content = [schema.ReasoningText(text=said)] if said else []
            return schema.ReasoningItem(id=new_id("rs"), summary=summary, content=content)
    raise BadRequest(
        f"Items of type '{item.type[:64]}' are not supported", param=f"{field}.type", code="unsupported_item"
    )


def _given(value: Any, field: str) -> Any:
    if value is None:
        raise invalid(field, "required field is missing")
    return value


def _message_item(item: schema.InputItem, field: str) -> schema.MessageItem:
    if item.role not in _ROLES:
        raise invalid(f"{field}.role", f"value must be one of {', '.join(_ROLES)}")
    content = _given(item.content, f"{field}.content")
    texts = [content] if isinstance(content, str) else _texts(content, f"{field}.content")
    part = schema.OutputText if item.role == "assistant" else schema.InputText
    return schema.MessageItem(
        id=new_id("msg"),
        role=item.role,  # type: ignore[arg-type]
        content=[part(text=text) for text in texts],
    )


def _texts(parts: Sequence[ContentPart], field: str) -> list[str]:
    out = []
    for at, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*_TEXTS, "refusal"):
            raise BadRequest(
                f"Content parts of type '{part.type[:64]}' are not supported",
                param=f"{field}[{at}].type",
                code="unsupported_content_part",
            )
        if text is None:
            raise invalid(
                f"{field}[{at}].{'refusal' if part.type == 'refusal' else 'text'}", "required field is missing"
            )
        out.append(text)
    return out


def check_outputs(before: Iterable[schema.Item], items: Sequence[schema.Item], field: str = "input") -> None:
    """Raises BadRequest for the output of a function that was not called."""
    calls = {item.call_id for item in (*before, *items) if isinstance(item, schema.FunctionCallItem)}
    for index, item in enumerate(items):
        if isinstance(item, schema.FunctionOutputItem) and item.call_id not in calls:
            raise invalid(f"{field}[{index}].call_id", f"no call has the id '{item.call_id[:64]}'")


def messages(instructions: str | None, items: Iterable[schema.Item]) -> list[ChatMessage]:
    """A conversation; the instructions are of this request. What the model wrote at once is one message."""
    turns = _Turns()
    if instructions is not None:
        turns.out.append(ChatMessage(role="system", content=instructions))
    for item in items:
        turns.add(item)
    turns.flush()
    return turns.out


class _Turns:
    """Joins the items of one answer: reasoning, text and calls."""

    def __init__(self) -> None:
        self.out: list[ChatMessage] = []
        self._reasoning, self._content = "", list[str]()
        self._calls: list[ToolCall] = []

    def add(self, item: schema.Item) -> None:
        match item:
            case schema.MessageItem(role="assistant"):
                if self._content and not self._calls:
                    self.flush()
                self._content.append("\n".join(part.text for part in item.content))
            case schema.FunctionCallItem():
                function = FunctionCall(name=item.name, arguments=item.arguments)
                self._calls.append(ToolCall(function=function, id=item.call_id))
            case schema.ReasoningItem():
                if self._content or self._calls:
                    self.flush()
                self._reasoning += "".join(part.text for part in item.content or item.summary)
            case schema.MessageItem():
                self.flush()
                text = "\n".join(part.text for part in item.content)
                self.out.append(ChatMessage(role=item.role, content=text))
            case schema.FunctionOutputItem():
                self.flush()
                text = item.output if isinstance(item.output, str) else "\n".join(part.text for part in item.output)
                self.out.append(ChatMessage(role="tool", content=text, tool_call_id=item.call_id))

    def flush(self) -> None:
        """Ends the answer that is being put together."""
        if not (self._content or self._calls):  # reasoning that came to no answer is nothing that was said
            self._reasoning = ""
            return
        self.out.append(
            ChatMessage(
                role="assistant",
                content="".join(self._content),
                tool_calls=self._calls or None,
                reasoning_content=self._reasoning or None,
            )
        )
        self._reasoning, self._content, self._calls = "", [], []
