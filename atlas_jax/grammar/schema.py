"""What is changed in a JSON schema before it becomes a grammar, and what of it a grammar cannot say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

_LONGEST = {
    "date-time": 35,
    "time": 24,
    "date": 10,
    "duration": 32,
    "email": 254,
    "hostname": 253,
    "uri": 2048,
}
"""Characters of a text of a format, from the standards where those have a limit. Without one, greedy decoding goes on writing
digits of a second's fraction until its tokens are used up, and the answer is cut in the middle of a string."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "example", "examples")
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]")
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (.*)", re.DOTALL)
_UNKNOWN_KEYS = re.compile(r'"([^"]*)"')
_PRINTABLE = re.compile(r"[A-Za-z0-9$_.:/+-]{1,40}")
_MOST_NAMED = 16


def adapt(schema: dict[str, Any]) -> list[str]:
    """Bounds the texts of formats and takes away what no grammar can say; tells what was taken away.

    Args:
      schema: is changed.
    """
    dropped: list[str] = []
    schema.pop("x-guidance", None)  # llguidance's own switches, which could make answers something else than JSON
    for part in _parts(schema):
        longest = _LONGEST.get(part["format"]) if isinstance(part.get("format"), str) else None
        if longest is not None:
            part.setdefault("maxLength", longest)
        pattern = part.get("pattern")
        if isinstance(pattern, str) and _LOOKS_AROUND.search(pattern):
            del part["pattern"]
            dropped.append("pattern")
    return dropped


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas within it."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            for key, value in part.items():
                if key in _NAMED and isinstance(value, dict):
                    left += value.values()
                elif key not in _DATA:
                    left.append(value)
            yield part


def not_enforced(dropped: Iterable[str], warnings: Iterable[str]) -> tuple[str, ...]:
    """Keywords that the grammar leaves out, each once, in letters fit for an HTTP header.

    Args:
      dropped: what `adapt` took away.
      warnings: what llguidance has left out.
    """
    found = list(dropped)
    for warning in warnings:
        if unknown := _UNKNOWN_FORMAT.fullmatch(warning):
            found.append(f"format:{unknown[1]}")
        elif warning.startswith("Unimplemented keys"):
            found += _UNKNOWN_KEYS.findall(warning)
        elif warning.startswith("oneOf"):
            found.append("oneOf")
    names = [name if _PRINTABLE.fullmatch(name) else name.partition(":")[0] for name in found]
    return tuple(dict.fromkeys(name for name in names if _PRINTABLE.fullmatch(name)))[:_MOST_NAMED]


_PATTERNS_TOO_LARGE = "its patterns, enumerations or bounds are too large"
_COMPLAINTS = (
    ("NoExtension", "it allows no answer"),
    (
        "items; max is",
        "it is too large: too many properties may be left out, or too many alternatives begin, at one place",
    ),
    ("initial lexer configuration", _PATTERNS_TOO_LARGE),
    ("lexer precomputation", _PATTERNS_TOO_LARGE),
    ("too many expressions", _PATTERNS_TOO_LARGE),
    ("Unable to determine if regex is empty", _PATTERNS_TOO_LARGE),
    ("recursion limit", "it is nested too deep"),
)


def explained(complaint: str) -> str:
    """What llguidance says of a schema, in one line for whoever wrote it."""
    for sign, meaning in _COMPLAINTS:
        if sign in complaint:
            return meaning
    lines = complaint.strip().splitlines() or ["no reason given"]
    said = lines[-1] if lines[0].startswith("regex parse error") else lines[0]
    return said.removeprefix("error: ")[:200]
