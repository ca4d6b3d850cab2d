"""Which tools a request offers and what it asks of them, checked; errors name the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atlas_jax.engine.api import CallGrammar, CallShape
from server.schemas.chat import AllowedTools, ChatRequest, FunctionDefinition, NamedTool, Tool
from server.tool_calls.style import Style
from server.validation import invalid

_MOST_CALLS = 16
"""In one answer that a grammar holds: small models that are told to call tools go on calling until they may not."""
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
# Keywords that may allow members beside `properties`.
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "if")


@dataclass(frozen=True, slots=True)
class Function:
    """A tool.

    Attributes:
      field: where in the request it stands.
      schema: of its arguments.
    """

    name: str
    field: str
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

    def grammar(self, style: Style, *, thinking: str | None, answer: Mapping[str, Any] | None) -> CallGrammar:
        """What answers must match.

        Args:
          thinking: what ends the reasoning that the template has begun, or None.
          answer: the schema of an answer that calls nothing, or None.
        """
        free = not self.forced and answer is None
        marks = _channel_marks(style)
        return CallGrammar(
            calls=tuple(
                CallShape(
                    begin=style.begin(one.name), schema=one.schema, end=style.close, field=f"{one.field}.parameters"
                )
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


def schema_grammar(style: Style, answer: Mapping[str, Any], thinking: str | None) -> CallGrammar | None:
    """What answers must match that call nothing and follow a schema; None where that is the schema alone.

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


def chosen_tools(body: ChatRequest) -> Tools | None:
    """The tools of a request; None where it has none, or wants none called.

    Raises:
      BadRequest: a tool is wrong or named twice, or the choice is of none that there is.
    """
    if body.tools and body.functions:
        raise invalid("functions", "cannot be given together with tools")
    legacy = not body.tools and (bool(body.functions) or body.function_call not in (None, "none", "auto"))
    if legacy:
        field, choice_field = "functions", "function_call"
        given = [(one, f"functions[{index}]") for index, one in enumerate(body.functions or ())]
    else:
        field, choice_field = "tools", "tool_choice"
        given = [(one.function, f"tools[{index}].function") for index, one in enumerate(body.tools or ())]
    choice = body.function_call if legacy else body.tool_choice
    functions = _functions(given)
    known = {one.name: one for one in functions}
    if not functions and choice not in (None, "none", "auto"):
        raise invalid(choice_field, f"needs {field}")
    if not functions or choice == "none":
        return None
    names, forced, single = _choice(choice, choice_field)
    for name, place in names:
        if name not in known:
            raise invalid(place, f"'{name[:128]}' is none of the {field}")
    most = 1 if legacy or single or body.parallel_tool_calls is False else _MOST_CALLS
    allowed = tuple(known[name] for name in dict.fromkeys(name for name, _ in names)) or functions
    return Tools(told=functions, allowed=allowed, forced=forced, most=most, legacy=legacy)


def functions_of(tools: Sequence[Tool]) -> tuple[Function, ...]:
    """Tools without a choice; raises BadRequest as `chosen_tools`."""
    return _functions([(one.function, f"tools[{index}].function") for index, one in enumerate(tools)])


def _functions(given: Sequence[tuple[FunctionDefinition, str]]) -> tuple[Function, ...]:
    known: dict[str, Function] = {}
    for definition, field in given:
        if (other := known.get(definition.name)) is not None:
            raise invalid(f"{field}.name", f"'{definition.name}' is the name of {other.field} already")
        known[definition.name] = _function(definition, field)
    return tuple(known.values())


def _choice(choice: Any, field: str) -> tuple[Sequence[tuple[str, str]], bool, bool]:
    """The names that may be called with where they stand, none for all; whether one must be; whether it is only one."""
    if isinstance(choice, AllowedTools):
        place = f"{field}.allowed_tools.tools"
        names = [
            (one.function.name, f"{place}[{at}].function.name") for at, one in enumerate(choice.allowed_tools.tools)
        ]
        return names, choice.allowed_tools.mode == "required", False
    if isinstance(choice, NamedTool):
        return [(choice.function.name, f"{field}.function.name")], True, True
    if choice is None or isinstance(choice, str):
        return (), choice == "required", False
    return [(choice.name, f"{field}.name")], True, True


def _function(given: FunctionDefinition, field: str) -> Function:
    schema = given.parameters
    if schema is None:
        return Function(given.name, field, _NO_ARGUMENTS, given)
    if schema.get("type", "object") != "object":
        raise invalid(f"{field}.parameters.type", "must be object: a tool's arguments are one")
    schema = {"type": "object", **schema}
    if "properties" in schema and not any(keyword in schema for keyword in _OPEN):
        schema["additionalProperties"] = False  # a model that may make up arguments does
    return Function(given.name, field, schema, given)
