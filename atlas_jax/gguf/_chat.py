"""Chat templates: conversations to prompts, as text or as tokens.

The template comes from the model file and may be hostile to the machine; the messages come from clients and may be
hostile to the conversation. The first is the sandbox's business (`_sandbox`). For the second, `render_tokens` takes
control tokens from the template's own text alone: there they become marks (`_template_ast`), characters that no message
holds, and what is left between the marks is plain text whatever it says.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
from gguf.constants import Keys

from atlas_jax.gguf._budget import MAX_DEPTH, Budget, Own, TemplateError, spending
from atlas_jax.gguf._metadata import get
from atlas_jax.gguf._sandbox import TemplateEnvironment
from atlas_jax.gguf._special import SpecialSplitter
from atlas_jax.gguf._template_ast import Marks, transform
from atlas_jax.gguf._template_facts import NEEDLE as _NEEDLE
from atlas_jax.gguf._template_facts import TemplateFacts
from atlas_jax.gguf._tokenizer import Tokenizer
from atlas_jax.gguf._vocab import special_text

# For base models, which come without a template and know no roles: a transcript that they can continue.
FALLBACK_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- message.role | capitalize }}: {{ message.content | trim }}

{% endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}"""

_MAX_SOURCE = 256 << 10
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})
# Marks are private-use characters of the last plane, in the order of the tokens they stand for.
_MARKS = range(0x100000, 0x10FFFE)
_MARK = re.compile(f"([{chr(_MARKS[0])}-{chr(_MARKS[-1])}])")


class ChatTemplate:
    """A model's chat template; safe to use from several threads.

    Attributes:
      source: the Jinja text.
      facts: what the template can do.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        time_limit: float = 1.0,
        output_limit: int = 16 << 20,
    ) -> None:
        """Compiles a template.

        Args:
          bos_token, eos_token: the texts the template knows by these names.
          time_limit: seconds of processor time for one rendering.
          output_limit: characters of the longest text, the result included.

        Raises:
          TemplateError: the template is wrong, too long, or uses what is not allowed.
        """
        self.source = source
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        self._time_limit = time_limit
        self._output_limit = output_limit
        self._environment = TemplateEnvironment()
        self._plain = self._compile(None)
        self._takes_parts = self._roles_with_parts()
        self.facts = TemplateFacts(self._tried, source)
        self._marked: tuple[Tokenizer, Marks, jinja2.Template] | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of a GGUF file, or None if it has none; `FALLBACK_TEMPLATE` may then serve.

        Raises:
          TemplateError: as the constructor.
          GGUFError: a metadata key is of a wrong type.
        """
        source = get(metadata, Keys.Tokenizer.CHAT_TEMPLATE, str)
        if source is None:
            return None
        return cls(
            source,
            bos_token=special_text(metadata, Keys.Tokenizer.BOS_ID),
            eos_token=special_text(metadata, Keys.Tokenizer.EOS_ID),
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, as text.

        Args:
          messages: with `role` and `content`: a string, None, or parts `{"type": "text", "text": …}`, which are joined
            with line feeds. Arguments of tool calls are given to the template as objects or as JSON in a string, as it
            wants them.
          tools: given to the template as they are.
          variables: further names for the template.

        Raises:
          TemplateError: the template refuses the messages, fails on them, or takes more than it may.
        """
        budget = Budget(self._time_limit, self._output_limit)
        context = self._context(messages, tools, add_generation_prompt, variables)
        return self._run(self._plain, budget, self._variables | context)

    def render_tokens(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt of a conversation as token ids, with control tokens from the template alone.

        Unless a message holds the text of a control token, these are the ids of `render`'s text with special tokens
        parsed. A BOS is put first if the model wants one and the template did not. The arguments are those of `render`.

        Raises:
          TemplateError: as `render`.
        """
        marks, template = self._marked_for(tokenizer)
        context = self._context(messages, tools, add_generation_prompt, variables)
        context, restore = _without_marks(context, self.source)
        known = {name: Own(marks.replace(text)) for name, text in self._variables.items()}
        rendered = self._run(template, Budget(self._time_limit, self._output_limit, marks.replace), known | context)
        controls = {mark: tokenizer.control_tokens[text] for text, mark in marks.chars.items()}
        parts: list[str | int] = []
        for piece in _MARK.split(rendered):
            if piece in controls:
                parts.append(controls[piece])
            elif piece:
                parts.append(piece.translate(restore))
        ids = tokenizer.encode_parts(parts)
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def _compile(self, marks: Marks | None) -> jinja2.Template:
        if len(self.source) > _MAX_SOURCE:
            raise TemplateError(f"chat template has {len(self.source)} characters, more than {_MAX_SOURCE}")
        with _short_errors():
            tree = transform(self._environment.parse(self.source), marks)
            code = self._environment.compile(tree, filename="<chat template>")
            return jinja2.Template.from_code(self._environment, code, self._environment.globals)

    def _marked_for(self, tokenizer: Tokenizer) -> tuple[Marks, jinja2.Template]:
        """The template with marks for a tokenizer's control tokens; kept for the next call."""
        with self._lock:
            if self._marked is None or self._marked[0] is not tokenizer:
                chars = dict(zip(tokenizer.control_tokens, map(chr, _MARKS), strict=False))
                splitter = SpecialSplitter({text: ord(mark) for text, mark in chars.items()})

                def replace(text: str) -> str:
                    return "".join(chr(part) if isinstance(part, int) else part for part in splitter.split(text))

                marks = Marks(chars, replace)
                self._marked = (tokenizer, marks, self._compile(marks))
            return self._marked[1:]

    def _roles_with_parts(self) -> frozenset[str]:
        """Roles whose content this template reads only as a list of parts: it loses a string, and finds it in a part.

        Each role is tried in a conversation it may stand in, after the forms of the roles before it are known.
        """
        found: set[str] = set()
        if "text" not in self.source:  # nobody reads a part without naming its text
            return frozenset()
        turns = {"user": (), "assistant": ("user",), "system": (), "tool": ("user", "assistant")}
        for role, before in turns.items():
            after = ("user",) if role == "system" else ()
            roles = (*before, role, *after)

            def seen(as_parts: frozenset[str], role: str = role, roles: tuple[str, ...] = roles) -> bool:
                messages = [{"role": one, "content": _NEEDLE if one == role else "x"} for one in roles]
                formed = [_message(index, message, as_parts) for index, message in enumerate(messages)]
                context = {"messages": formed, "tools": None, "add_generation_prompt": False}
                try:
                    return _NEEDLE in self._run(
                        self._plain, Budget(self._time_limit, self._output_limit), self._variables | context
                    )
                except TemplateError:
                    return False

            if not seen(frozenset(found)) and seen(frozenset({*found, role})):
                found.add(role)
        return frozenset(found)

    def _tried(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """A conversation as the template is given it."""
        formed = [_message(index, message, self._takes_parts) for index, message in enumerate(messages)]
        context = {"messages": formed, "tools": tools, "add_generation_prompt": False}
        return self._run(
            self._plain, Budget(self._time_limit, self._output_limit), self._variables | _json_copy(context)
        )

    def _context(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The variables of a rendering, as copies that hold nothing but JSON values."""
        extra = dict(variables or {})
        for name in extra:
            if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
                raise TemplateError(f"template variable {name!r:.60} is not allowed")
        context = {
            "messages": [
                _message(index, _with_arguments(message, self.facts.text_arguments), self._takes_parts)
                for index, message in enumerate(messages)
            ],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **extra,
        }
        return {name: _json_copy(value) for name, value in context.items()}

    def _run(self, template: jinja2.Template, budget: Budget, variables: Mapping[str, Any]) -> str:
        with spending(budget), _short_errors():
            for value in variables.values():
                budget.admit(value)
            result = "".join(template.root_render_func(template.new_context(dict(variables))))
            budget.check(len(result))
            return result


@contextmanager
def _short_errors() -> Iterator[None]:
    """Turns whatever a template brings about into a `TemplateError`."""
    try:
        yield
    except TemplateError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template line {error.lineno}: {error.message or 'syntax error'}"[:300]) from None
    except RecursionError:
        raise TemplateError("chat template is nested too deep") from None
    except MemoryError:
        raise TemplateError("chat template needs too much memory") from None
    except Exception as error:
        raise TemplateError(f"chat template failed: {error}"[:300]) from None


def _message(index: int, message: Mapping[str, Any], as_parts: Collection[str]) -> dict[str, Any]:
    """A message with its content as a text, or as a part that is one if its role is among `as_parts`."""
    if not isinstance(message, Mapping):
        raise TemplateError(f"message {index} is not an object")
    result = dict(message)
    calls = result.get("tool_calls")
    content = result.get("content")
    if isinstance(content, (list, tuple)):
        result["content"] = "\n".join(_text_part(index, number, part) for number, part in enumerate(content))
    elif content is None and not calls:
        # Templates join contents to other texts; only beside tool calls do they expect that there is none.
        result["content"] = ""
    elif content is not None and not isinstance(content, str):
        raise TemplateError(f"message {index} has a content of type {type(content).__name__}")
    if result.get("role") in as_parts:
        result["content"] = [{"type": "text", "text": result.get("content") or ""}]
    return result


def _text_part(index: int, number: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise TemplateError(f"message {index}: content part {number} is {kind!r:.60}, only text is read")
    return text


def _with_arguments(message: Any, as_text: bool) -> Any:
    """A message whose tool calls have their arguments as JSON in a string, or as objects."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(calls, (list, tuple)):
        return message
    return {**message, "tool_calls": [_tool_call(call, as_text) for call in calls]}


def _tool_call(call: Any, as_text: bool) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, Mapping) and as_text:
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError):
            return call
    elif isinstance(arguments, str) and not as_text:
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        if not isinstance(arguments, dict):
            return call
    else:
        return call
    return {**call, "function": {**(function or {}), "arguments": arguments}}


def _json_copy(value: Any, level: int = 0) -> Any:
    if level > MAX_DEPTH:
        raise TemplateError(f"messages are nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return str(value)  # of a class of its own, it could do other things than a string
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_copy(child, level + 1) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_copy(child, level + 1) for child in value]
    raise TemplateError(f"messages hold a value of type {type(value).__name__}")


def _without_marks(context: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[int, str]]:
    """Variables in which other private characters stand for marks, and the table that brings those back."""
    if not any(_MARK.search(text) for text in _strings(context) if not text.isascii()):
        return context, {}
    alphabet = set(source).union(*_strings(context))
    marks = sorted(char for char in alphabet if ord(char) in _MARKS)
    spare = [char for char in map(chr, (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))) if char not in alphabet]
    if len(spare) < len(marks):
        raise TemplateError("messages hold too many private-use characters")
    table = str.maketrans(dict(zip(marks, spare, strict=False)))
    restore = str.maketrans(dict(zip(spare, marks, strict=False)))
    return {name: _translated(value, table) for name, value in context.items()}, restore


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)


def _translated(value: Any, table: Mapping[int, Any]) -> Any:
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {key.translate(table): _translated(child, table) for key, child in value.items()}
    return [_translated(child, table) for child in value] if isinstance(value, list) else value
