"""Which tools a request offers and what it asks of them, checked; errors name the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atlas_jax.engine.api import AnswerShape, CallGrammar, CallShape
from server.closed_schema import closed
from server.schemas.chat import AllowedTools, ChatRequest, FunctionDefinition, NamedTool, Tool
from server.tool_calls.style import Style
from server.validation import invalid

_MOST_CALLS = 16
"""In one answer that a grammar holds: small models that are told to call tools go on calling until they may not."""
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Function:
    """A tool.

    Attributes:
      field, schema_field: where in the request it stands, and the schema of its arguments.
      schema: of its arguments.
    """

    name: str
    field: str
    schema_field: str
    schema: Mapping[str, Any]
    definition: FunctionDefinition

    def described(self) -> dict[str, Any]:
        """It as chat templates take it."""
        given = self.definition
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": given.description or "",
                "parameters": given.parameters or {"type": "object", "properties": {}},
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """The tools of a request.

    Attributes:
      told: those the model is told of.
      allowed: those it may call.
      forced: whether it must call one.
      most: calls an answer may have.
      legacy: whether the request speaks of functions, as OpenAI's API did before it had tools.
    """

    told: tuple[Function, ...]
    allowed: tuple[Function, ...]
    forced: bool
    most: int
    legacy: bool

    @property
    def names(self) -> frozenset[str]:
        """Of the tools that may be called."""
        return frozenset(one.name for one in self.allowed)

    @property
    def strict(self) -> bool:
        """Whether one of them must be called by its schema and not otherwise."""
        return any(one.definition.strict for one in self.allowed)

    def grammar(self, style: Style, *, thinking: str | None, answer: AnswerShape | None) -> CallGrammar:
        """What answers must match.

        Args:
          thinking: what ends the reasoning that the template has begun, or None.
          answer: what an answer that calls nothing must match, or None.
        """
        free = not self.forced and answer is None
        marks = _channel_marks(style)
        return CallGrammar(
            calls=tuple(
                CallShape(begin=style.begin(one.name), schema=one.schema, end=style.close, field=one.schema_field)
                for one in self.allowed
            ),
            lead=style.lead if free or not style.alone else "",
            first=style.first,
            between=style.between,
            after=style.after,
            most=self.most if style.parallel else 1,
            text=free,
            bare=free and style.alone,
            answer=None if self.forced else answer,
            **{**marks, "thinking": None if free else marks.get("thinking", thinking)},
        )


def schema_grammar(style: Style, answer: AnswerShape, thinking: str | None) -> CallGrammar | None:
    """What answers must match that call nothing and have a shape; None where that is the shape alone.

    Args:
      thinking: as for `Tools.grammar`.
    """
    marks = _channel_marks(style)
    if not marks and thinking is None:
        return None
    return CallGrammar(answer=answer, **{"thinking": thinking, **marks})


def _channel_marks(style: Style) -> dict[str, Any]:
    """Of a grammar, what is written around the parts of an answer in channels; nothing of other answers."""
    if style.channels is None:
        return {}
    begin, end = style.channels.thinking
    return {"thinks": begin, "thinking": end, "before": style.channels.final}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a request asks of its tools.

    Attributes:
      names: those that may be called with where in the request they are named, none for all.
      forced: whether one must be called.
      single: whether only one call is wanted.
      none: whether none may be called.
    """

    names: Sequence[tuple[str, str]] = ()
    forced: bool = False
    single: bool = False
    none: bool = False


CHOICES = {
    None: Choice(),
    "auto": Choice(),
    "none": Choice(none=True),
    "required": Choice(forced=True),
    "any": Choice(forced=True),
}
"""What a choice by a word means, in any API."""


def choose(
    functions: Sequence[Function],
    choice: Choice,
    *,
    field: str,
    choice_field: str = "tool_choice",
    parallel: bool = True,
    legacy: bool = False,
) -> Tools | None:
    """The tools of a request; None where it has none, or wants none called.

    Args:
      field, choice_field: what the API calls them.
      parallel: whether an answer may have several calls.

    Raises:
      BadRequest: the choice is of none that there is.
    """
    if not functions and (choice.forced or choice.names):
        raise invalid(choice_field, f"needs {field}")
    if not functions or choice.none:
        return None
    known = {one.name: one for one in functions}
    for name, place in choice.names:
        if name not in known:
            raise invalid(place, f"'{name[:128]}' is none of the {field}")
    most = 1 if legacy or choice.single or not parallel else _MOST_CALLS
    allowed = tuple(known[name] for name in dict.fromkeys(name for name, _ in choice.names)) or tuple(functions)
    return Tools(told=tuple(functions), allowed=allowed, forced=choice.forced, most=most, legacy=legacy)


def chosen_tools(body: ChatRequest) -> Tools | None:
    """The tools of a chat completion, as `choose`; raises BadRequest also for a tool that is wrong or named twice."""
    if body.tools and body.functions:
        raise invalid("functions", "cannot be given together with tools")
    if not body.tools and (body.functions or body.function_call not in (None, "none", "auto")):
        functions = functions_of(
            (one, f"functions[{index}]", f"functions[{index}].parameters")
            for index, one in enumerate(body.functions or ())
        )
        choice = _choice(body.function_call, "function_call")
        return choose(functions, choice, field="functions", choice_field="function_call", legacy=True)
    choice = _choice(body.tool_choice, "tool_choice")
    parallel = body.parallel_tool_calls is not False
    return choose(functions_of_tools(body.tools or ()), choice, field="tools", parallel=parallel)


def functions_of_tools(tools: Sequence[Tool]) -> tuple[Function, ...]:
    """Tools as chat completions have them; raises BadRequest as `functions_of`."""
    places = (f"tools[{index}].function" for index in range(len(tools)))
    return functions_of((one.function, place, f"{place}.parameters") for one, place in zip(tools, places, strict=True))


def functions_of(given: Iterable[tuple[FunctionDefinition, str, str]]) -> tuple[Function, ...]:
    """The functions of a request, checked.

    Args:
      given: each with where it stands in the request, and where the schema of its arguments does.

    Raises:
      BadRequest: one is wrong, or has another's name.
    """
    known: dict[str, Function] = {}
    for definition, field, schema_field in given:
        if (other := known.get(definition.name)) is not None:
            raise invalid(f"{field}.name", f"'{definition.name}' is the name of {other.field} already")
        known[definition.name] = _function(definition, field, schema_field)
    return tuple(known.values())


def _choice(choice: Any, field: str) -> Choice:
    if isinstance(choice, AllowedTools):
        place = f"{field}.allowed_tools.tools"
        names = [
            (one.function.name, f"{place}[{at}].function.name") for at, one in enumerate(choice.allowed_tools.tools)
        ]
        return Choice(names=names, forced=choice.allowed_tools.mode == "required")
    if isinstance(choice, NamedTool):
        return Choice(names=[(choice.function.name, f"{field}.function.name")], forced=True, single=True)
    if choice is None or isinstance(choice, str):
        return CHOICES[choice]
    return Choice(names=[(choice.name, f"{field}.name")], forced=True, single=True)


def _function(given: FunctionDefinition, field: str, schema_field: str) -> Function:
    schema = given.parameters
    if schema is None:
        return Function(given.name, field, schema_field, _NO_ARGUMENTS, given)
    if schema.get("type", "object") != "object":
        raise invalid(f"{schema_field}.type", "must be object: a tool's arguments are one")
    return Function(given.name, field, schema_field, closed({"type": "object", **schema}), given)
