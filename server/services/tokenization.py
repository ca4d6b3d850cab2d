"""Text to tokens and back, the chat template, and the limits on both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from atlas_jax.engine.api import ChatFrame
from server.errors import BadRequest
from server.schemas.chat import ChatMessage, ContentPart
from server.services.engine_supervisor import EngineSupervisor
from server.services.sampling import MAX_SEQUENCES
from server.services.thread_pools import ThreadPools
from server.services.unsupported import template_variables
from server.tool_calls.choice import Function
from server.tool_calls.conversation import ChatForm, calls_of
from server.validation import invalid

T = TypeVar("T")
# Tokenising this much takes about a millisecond; more goes to a thread, so that the loop keeps serving the others.
_INLINE_CHARS = 4096
# What a message, and a part of one, cost beside their text, in characters: a template writes out an empty message in
# some 30 microseconds.
_MESSAGE_CHARS, _PART_CHARS = 128, 4
# Schemas may have any size, so conversations with more than a few tools are written on a thread.
_TOOL_CHARS = 1024
_TAIL_TOKENS = 16


class Tokenization:
    """The engine's tokenizer and chat template, off the event loop where that pays."""

    def __init__(self, supervisor: EngineSupervisor, pools: ThreadPools) -> None:
        self._supervisor, self._pools = supervisor, pools
        self._form: ChatForm | None = None

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        return work() if size <= _INLINE_CHARS else await self._pools.run("tokenization", work)

    async def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        tokenizer = self._supervisor.engine.tokenizer
        return await self._run(
            len(text), lambda: tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
        )

    async def decode(self, ids: Sequence[int], field: str) -> str:
        """The text of token ids; raises BadRequest for an id the vocabulary does not have."""
        tokenizer = self._supervisor.engine.tokenizer

        def decode() -> str:
            self.check_ids(ids, field)
            return tokenizer.decode(ids)

        return await self._run(len(ids), decode)

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of every token."""
        tokenizer = self._supervisor.engine.tokenizer
        return await self._run(len(ids), lambda: [tokenizer.token_bytes(one) for one in ids])

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raises BadRequest for an id the vocabulary does not have."""
        size = self._supervisor.engine.tokenizer.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < size):
            raise invalid(field, f"token ids must be between 0 and {size - 1}")

    async def prompts(
        self, given: str | Sequence[int | str | list[int]] | None, *, echo: bool
    ) -> tuple[list[list[int]], list[str] | None]:
        """The prompts of a completion as token ids, and with `echo` their texts.

        Accepts a string, token ids, and lists of either; raises BadRequest for a mixture and for an empty prompt.
        """
        given = "" if given is None else given
        prompts, texts = [], []
        for item in await self._run(len(given), lambda: _prompt_items(given)):
            if isinstance(item, str):
                ids = await self.encode(item, add_special=True, parse_special=True)
            else:
                await self._run(len(item), functools.partial(self.check_ids, item, "prompt"))
                ids = item
            if not ids:
                raise invalid("prompt", "must have at least one token")
            prompts.append(ids)
            if echo:
                texts.append(item if isinstance(item, str) else await self.decode(item, "prompt"))
        return prompts, texts if echo else None

    async def texts(self, given: str | Sequence[int | str | list[int]], field: str, *, most: int) -> list[list[int]]:
        """Texts as token ids, for a model to read and not to go on with: names of control tokens in them are text.

        Accepts what `prompts` does, of at most so many texts.
        """
        out = []
        items = await self._run(len(given), lambda: _prompt_items(given, field, most))
        for index, item in enumerate(items):
            name = field if len(items) == 1 else f"{field}[{index}]"
            if isinstance(item, str):
                ids = await self.encode(item, add_special=True, parse_special=False)
            else:
                await self._run(len(item), functools.partial(self.check_ids, item, name))
                ids = item
            if not ids:
                raise invalid(name, "must have at least one token")
            out.append(ids)
        return out

    async def gap(self, marks: Sequence[Sequence[int]], before: str, after: str, begun: str = "") -> list[int]:
        """A prompt for the text of a gap, which may have begun; `marks` are those of `ModelInfo.infill`."""
        texts = [await self.encode(text, add_special=False, parse_special=False) for text in (before, after, begun)]
        return [token for mark, text in zip(marks, texts, strict=True) for token in (*mark, *text)]

    @property
    def form(self) -> ChatForm:
        """How the model's template has conversations with tools."""
        facts = self._supervisor.engine.template
        if self._form is None or self._form.facts is not facts:
            self._form = ChatForm(facts)
        return self._form

    async def chat(
        self, messages: Sequence[ChatMessage], variables: Mapping[str, Any] | None, functions: Sequence[Function] = ()
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
          functions: what the model is told it may call.
        """
        ids = await self._written(self._supervisor.engine.render_chat, messages, variables, functions)
        if not ids:
            raise invalid("messages", "must have at least one token")
        return ids

    async def chat_frame(
        self, messages: Sequence[ChatMessage], variables: Mapping[str, Any] | None, functions: Sequence[Function] = ()
    ) -> ChatFrame:
        """What the template puts around a conversation, for a session to tell what it knows of it."""
        return await self._written(self._supervisor.engine.chat_frame, messages, variables, functions)

    async def template(
        self, messages: Sequence[ChatMessage], variables: Mapping[str, Any] | None, functions: Sequence[Function] = ()
    ) -> str:
        """A conversation as the text the model reads."""
        return await self._written(self._supervisor.engine.apply_template, messages, variables, functions)

    async def _written(
        self,
        write: Callable[..., T],
        messages: Sequence[ChatMessage],
        variables: Mapping[str, Any] | None,
        functions: Sequence[Function],
    ) -> T:
        form = self.form
        allowed = template_variables(variables, channels=form.facts.channels)

        def work() -> T:
            given, tools = form.write(plain_messages(messages), functions)
            return write(given, tools=tools, variables=allowed or None)

        return await self._run(_size(messages) + _TOOL_CHARS * len(functions), work)

    def ends_with(self, prompt: Sequence[int], mark: str) -> bool:
        """Whether a prompt ends with a text, but for white space."""
        tail = self._supervisor.engine.tokenizer.decode(prompt[-_TAIL_TOKENS:])
        return tail.rstrip().endswith(mark)


def _prompt_items(
    given: str | Sequence[int | str | list[int]], field: str = "prompt", most: int = MAX_SEQUENCES
) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if all(isinstance(one, int) for one in given):
        return [list(given)]  # type: ignore[arg-type]
    if not (all(isinstance(one, str) for one in given) or all(isinstance(one, list) for one in given)):
        raise invalid(field, "must be a string, token ids, a list of strings or a list of token id lists")
    if len(given) > most:
        raise invalid(field, f"must have at most {most} {'prompts' if field == 'prompt' else 'texts'}")
    return list(given)  # type: ignore[arg-type]


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: text content, and the roles of open models."""
    out: list[dict[str, Any]] = []
    called: str | None = None
    for index, message in enumerate(messages):
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        plain: dict[str, Any] = {"role": role, "content": _content(message, index)}
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                plain[name] = value
        if calls := calls_of(message, index):
            plain["tool_calls"] = calls
            called = calls[-1]["id"]
        elif message.role == "function" and called is not None:  # the results of functions have no ids
            plain["tool_call_id"] = called
        out.append(plain)
    return out


def _content(message: ChatMessage, index: int) -> str:
    content = message.content
    if content is None:
        if message.role == "assistant":
            return message.refusal or ""
        raise invalid(f"messages[{index}].content", "required field is missing")
    if isinstance(content, str):
        return content
    return "\n".join(_part(part, f"messages[{index}].content[{at}]") for at, part in enumerate(content))


def _part(part: ContentPart, field: str) -> str:
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if part.type not in ("text", "refusal"):
        raise BadRequest(
            f"Content parts of type '{part.type[:64]}' are not supported",
            param=f"{field}.type",
            code="unsupported_content_part",
        )
    if text is None:
        raise invalid(f"{field}.{part.type}", "required field is missing")
    return text


def _size(messages: Sequence[ChatMessage]) -> int:
    """What a conversation costs to write out, in characters."""
    size = 0
    for message in messages:
        content = message.content or ""
        size += _MESSAGE_CHARS
        for call in message.tool_calls or ():
            arguments = call.function.arguments
            size += _TOOL_CHARS + (len(arguments) if isinstance(arguments, str) else _INLINE_CHARS)
        size += (
            len(content) if isinstance(content, str) else sum(_PART_CHARS + len(part.text or "") for part in content)
        )
    return size
