"""Turns decoded JSON into a struct, strictly, and a mismatch into a message that names the field and its range."""

from __future__ import annotations

import re
import types
import typing
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from server.errors import BadRequest

T = TypeVar("T")

_PATH = re.compile(r" - at `\$(?P<path>.*)`$")
_STEP = re.compile(r"\.(?P<name>[^.\[]+)|\[(?P<index>\d+|\.\.\.)\]")
_NUMBER = re.compile(r"Expected `(?:int|float)` (?:[<>]=?|that)")
_LENGTH = re.compile(r"Expected `(?P<what>\w+)` of length (?P<op>[<>]=) (?P<bound>\d+)")
_PATTERN = re.compile(r"Expected `str` matching regex '(?P<pattern>.*)'")
_TYPE = re.compile(r"Expected `(?P<want>[^`]+)`, got `(?P<got>[^`]+)`")
_FIELD = re.compile(r"Object (?P<how>missing required|contains unknown) field `(?P<name>.*)`$", re.DOTALL)
_JSON_NAMES = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}


def parse(kind: type[T], data: Any) -> T:
    """`data` as a `kind`; raises BadRequest in the words of the API contract."""
    try:
        return msgspec.convert({} if data is None else data, kind, strict=True)
    except msgspec.ValidationError as error:
        raise explain(kind, str(error)) from None


def invalid(field: str, reason: str, *, code: str | None = None) -> BadRequest:
    """The error of one field."""
    return BadRequest(f"Validation error in field '{field}': {reason}", param=field, code=code)


def unsupported(field: str) -> BadRequest:
    """The error of a field that would change the text and is not implemented."""
    return BadRequest(f"'{field}' is not supported by this server", param=field, code="unsupported_parameter")


def explain(kind: type[Any], text: str) -> BadRequest:
    """The contract's error for a msgspec message about `kind`."""
    at = _PATH.search(text)
    text = text[: at.start()] if at else text
    steps = list(_STEP.finditer(at["path"])) if at else []
    path = "".join(f"[{step['index']}]" if step["index"] else f".{step['name']}" for step in steps)
    path = path.lstrip(".").replace("[...]", "")
    if found := _FIELD.search(text):
        name = found["name"][:128]
        where = f"{path}.{name}" if path else name
        missing = found["how"] == "missing required"
        return invalid(where, "required field is missing" if missing else "unknown field")
    if not path:
        return BadRequest("The request body must be a JSON object")
    return invalid(path, _reason(kind, text, steps))


def _reason(kind: type[Any], text: str, steps: list[re.Match[str]]) -> str:
    if _NUMBER.match(text):
        return _range(_meta(kind, steps))
    if found := _LENGTH.match(text):
        unit = {"str": "characters", "object": "entries"}.get(found["what"], "items")
        return f"must have at {'most' if found['op'] == '<=' else 'least'} {found['bound']} {unit}"
    if found := _TYPE.match(text):
        want = [_JSON_NAMES.get(name, name) for name in found["want"].split(" | ") if name != "null"]
        return f"expected {' or '.join(want)}, got {_JSON_NAMES.get(found['got'], found['got'])}"
    if found := _PATTERN.match(text):
        return f"must match {found['pattern']}"
    if text.startswith("Invalid enum value"):
        return f"value must be one of {', '.join(_choices(_annotation(kind, steps)))}"
    return "invalid value"


def _range(meta: msgspec.Meta | None) -> str:
    low, high = (None, None) if meta is None else (meta.ge, meta.le)
    if meta is not None and meta.multiple_of is not None and low is not None and high is not None:
        return f"value must be a multiple of {_plain(meta.multiple_of)} between {_plain(low)} and {_plain(high)}"
    if meta is not None and meta.gt is not None:
        above = f"value must be greater than {_plain(meta.gt)}"
        if meta.lt is not None:
            return f"{above} and less than {_plain(meta.lt)}"
        return above if high is None else f"{above} and at most {_plain(high)}"
    if low is not None and high is not None:
        return f"value must be between {_plain(low)} and {_plain(high)}"
    if low is not None:
        return f"value must be at least {_plain(low)}"
    return f"value must be at most {_plain(high)}" if high is not None else "value out of range"


def _plain(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


@cache
def _hints(struct: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(struct, include_extras=True)


def _members(annotation: Any) -> list[Any]:
    """The annotation's alternatives with `Annotated` kept, `None` dropped."""
    if get_origin(annotation) is typing.Annotated and get_origin(_bare(annotation)) in (typing.Union, types.UnionType):
        annotation = _bare(annotation)
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for member in get_args(annotation) for part in _members(member)]
    return [] if annotation is type(None) else [annotation]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is typing.Annotated else annotation


def _annotation(kind: Any, steps: list[re.Match[str]]) -> Any:
    """The annotation at a path, found by walking structs, lists and dicts; None where the walk is lost."""
    current = kind
    for step in steps:
        following = None
        for member in _members(current):
            bare = _bare(member)
            if step["name"] and isinstance(bare, type) and issubclass(bare, msgspec.Struct):
                following = _hints(bare).get(step["name"])
            elif step["index"] and get_origin(bare) in (list, tuple, dict):
                following = get_args(bare)[-1]
        if following is None:
            return None
        current = following
    return current


def _meta(kind: Any, steps: list[re.Match[str]]) -> msgspec.Meta | None:
    for member in _members(_annotation(kind, steps)):
        for extra in get_args(member)[1:]:
            if isinstance(extra, msgspec.Meta) and (extra.ge, extra.gt, extra.le, extra.lt) != (None,) * 4:
                return extra
    return None


def _choices(annotation: Any) -> list[str]:
    for member in _members(annotation):
        bare = _bare(member)
        if get_origin(bare) is typing.Literal:
            return [str(value) for value in get_args(bare)]
    return []
