"""What answers schemas allow: those that pydantic writes, numbers and times that end, and keywords that are left out."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import random
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.gguf import GGUFFile, Tokenizer
from atlas_jax.grammar.answer import Tokens
from atlas_jax.grammar.schema import adapt, explained, not_enforced
from atlas_jax.grammar.wire import ANSWER, COMPLETE, MAY_GO_ON
from atlas_jax.grammar.worker import _compile
from tests import tiny_model

Choose = Callable[[list[int]], int]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(pydantic.BaseModel):
    number: int
    text: Annotated[str | None, pydantic.Field(max_length=5)] = None


class Nested(pydantic.BaseModel):
    inner: Inner
    more: dict[str, Inner]
    kind: Literal["a", 1, None]
    colour: Colour


class Tree(pydantic.BaseModel):
    value: int
    left: Tree | None = None


TYPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "path": (pathlib.Path, ("format:path",)),
    "secret": (pydantic.SecretStr, ("format:password",)),
    "bytes": (bytes, ("format:binary",)),
    "set": (set[int], ("uniqueItems",)),
    "frozenset": (frozenset[str], ("uniqueItems",)),
    "uuid": (uuid.UUID, ()),
    "decimal": (decimal.Decimal, ()),
    "datetime": (datetime.datetime, ()),
    "date": (datetime.date, ()),
    "time": (datetime.time, ()),
    "timedelta": (datetime.timedelta, ()),
    "ipv4": (ipaddress.IPv4Address, ()),
    "ipv6": (ipaddress.IPv6Address, ()),
    "network": (ipaddress.IPv4Network, ("format:ipv4network",)),
    "literal": (Literal["a", 1, None], ()),
    "enum": (Colour, ()),
    "optional": (int | None, ()),
    "union": (int | str | Inner, ()),
    "nested": (Nested, ()),
    "tree": (Tree, ()),
    "dict": (dict[str, int], ()),
    "dict by number": (dict[int, Inner], ()),
    "dict by literal": (dict[Literal["x", "y"], int], ("propertyNames",)),
    "tuple": (tuple[int, str], ()),
    "list": (Annotated[list[int], pydantic.Field(min_length=2, max_length=3)], ()),
    "float": (float, ()),
    "multiple": (Annotated[int, pydantic.Field(multiple_of=5, gt=3)], ()),
    "pattern": (Annotated[str, pydantic.Field(pattern=r"^\d{3}$")], ()),
    "url": (pydantic.AnyUrl, ()),
}
# What the grammar lets through and pydantic does not: texts of formats that nobody can enforce, days that no month has.
INEXACT = ("network", "date", "datetime", "timedelta", "time", "dict by number", "dict by literal", "url", "decimal")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    with GGUFFile.open(tiny_model.write_model(tmp_path_factory.mktemp("grammar") / "tiny.gguf")) as file:
        return Tokens(Tokenizer.from_metadata(file.metadata))


def ignored_by(tokens: Tokens, schema: dict[str, Any]) -> tuple[str, ...]:
    start, compiled = _compile(ANSWER + json.dumps({"wanted": schema}).encode(), tokens)
    assert start is not None, compiled.error
    return compiled.ignored


def write(tokens: Tokens, schema: dict[str, Any], choose: Choose, limit: int = 400) -> str:
    """An answer whose tokens `choose` picks among those that may come next; it has to end within `limit` of them."""
    start, compiled = _compile(ANSWER + json.dumps({"wanted": schema}).encode(), tokens)
    assert start is not None, compiled.error
    answer, text, token = start.answer(), b"", None
    for _ in range(limit):
        verdict = answer.take(token)
        if verdict == COMPLETE:
            return text.decode()
        assert verdict == MAY_GO_ON, answer.error
        bits = np.unpackbits(answer.mask, bitorder="little")[: len(tokens.texts)]
        token = choose([int(one) for one in np.flatnonzero(bits)])
        if not tokens.texts[token]:  # the end
            return text.decode()
        text += tokens.texts[token]
    raise AssertionError(f"no end: {text[-80:]!r}")


def liking(tokens: Tokens, wanted: bytes) -> Choose:
    """Takes the allowed token whose first byte is earliest in `wanted`, else the first; the end only if nothing else may."""

    def choose(allowed: list[int]) -> int:
        def rank(token: int) -> tuple[int, int]:
            text = tokens.texts[token]
            return (len(wanted) + 1 if not text else wanted.find(text[:1]) % (len(wanted) + 1), token)

        return min(allowed, key=rank)

    return choose


def at_random(tokens: Tokens, seed: int) -> Choose:
    """Draws, but after a while prefers what closes something."""
    draws = random.Random(seed)
    drawn = 0

    def choose(allowed: list[int]) -> int:
        nonlocal drawn
        drawn += 1
        ends = [token for token in allowed if not tokens.texts[token]]
        closing = [token for token in allowed if tokens.texts[token] in (b'"', b"}", b"]")]
        if drawn > 30 and (ends or closing):
            return (ends or closing)[0]
        plain = [token for token in allowed if tokens.texts[token].isascii()]
        return draws.choice(plain or allowed)

    return choose


@pytest.mark.parametrize(("kind", "ignored"), TYPES.values(), ids=TYPES)
def test_what_pydantic_writes_is_accepted_and_what_is_left_out_is_said(
    tokens: Tokens, kind: Any, ignored: tuple[str, ...]
) -> None:
    assert ignored_by(tokens, pydantic.TypeAdapter(kind).json_schema()) == ignored


@pytest.mark.parametrize("name", [name for name in TYPES if name not in INEXACT])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_an_answer_is_what_pydantic_takes(tokens: Tokens, name: str, seed: int) -> None:
    adapter = pydantic.TypeAdapter(TYPES[name][0])
    adapter.validate_json(write(tokens, adapter.json_schema(), at_random(tokens, seed)))


DIGITS_FIRST = [b"9876543210", b"0123456789", b"19.eE+-", b"1e+9", b"-.9", b"8E9"]


@pytest.mark.parametrize("wanted", DIGITS_FIRST)
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "number", "minimum": 0},
        {"type": "integer", "exclusiveMinimum": -5},
        {"type": "number", "multipleOf": 0.01},
        {"type": "integer", "multipleOf": 7},
        {"anyOf": [{"type": "number"}, {"type": "string", "maxLength": 3}]},
        {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
        {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"], "additionalProperties": False},
        {"type": "string", "format": "date-time"},
        {"type": "string", "format": "time"},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "duration"},
        {"type": "string", "format": "email"},
        {"type": "string", "format": "hostname"},
        {"type": "string", "format": "ipv4"},
        {"type": "string", "format": "ipv6"},
        {"type": "string", "format": "uuid"},
    ],
)
def test_numbers_and_times_end_however_much_the_model_likes_digits(
    tokens: Tokens, schema: dict[str, Any], wanted: bytes
) -> None:
    value = json.loads(write(tokens, schema, liking(tokens, wanted), limit=700))
    if (
        schema.get("format") == "date-time" and value[:4] > "0000" and ":60" not in value
    ):  # Python knows no leap seconds
        datetime.datetime.fromisoformat(value.replace("z", "Z").upper())


@pytest.mark.parametrize("value", [10**32, -(10**40), 2**62, 0.1234567890123456, "7" * 60, ["9" * 25, 10**25]])
def test_long_numbers_that_a_schema_asks_for_are_written(tokens: Tokens, value: Any) -> None:
    assert json.loads(write(tokens, {"const": value}, liking(tokens, b"0123456789"))) == value


def test_a_text_may_have_any_number_of_digits(tokens: Tokens) -> None:
    text = json.loads(write(tokens, {"type": "string", "maxLength": 80}, liking(tokens, b"7")))
    assert text == "7" * 80


@pytest.mark.parametrize(
    ("schema", "ignored"),
    [
        (
            {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "contains": {}},
            {"uniqueItems", "contains"},
        ),
        ({"not": {"type": "string"}, "if": {}, "then": {}}, {"not", "if", "then"}),
        ({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, {"pattern"}),
        ({"type": "string", "format": "evil\r\nset-cookie: a=b"}, {"format"}),
        ({"type": "string", "format": "Ω"}, {"format"}),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, {"oneOf"}),
        ({"type": "integer", "x-mine": 1, "description": "d", "readOnly": True, "$comment": "c"}, set()),
    ],
)
def test_keywords_that_cannot_be_enforced_are_named(tokens: Tokens, schema: dict[str, Any], ignored: set[str]) -> None:
    assert set(ignored_by(tokens, schema)) == ignored


@given(st.lists(st.text(), max_size=40))
def test_what_is_named_fits_into_a_header(names: list[str]) -> None:
    found = not_enforced(names, [f"Unknown format: {name}" for name in names])
    assert len(found) <= 16
    assert all(name.isascii() and name.isprintable() and "," not in name for name in found)


def test_names_of_properties_and_data_are_no_keywords() -> None:
    schema: dict[str, Any] = {
        "properties": {
            "pattern": {"type": "string"},
            "format": {"type": "string", "format": "date-time"},
            "const": {"type": "string", "format": "email", "maxLength": 9},
        },
        "const": {"pattern": "(?=a)", "format": "time"},
        "enum": [{"pattern": "(?!a)"}],
        "x-guidance": {"item_separator": "anything"},
    }
    assert adapt(schema) == []
    assert schema == {
        "properties": {
            "pattern": {"type": "string"},
            "format": {"type": "string", "format": "date-time", "maxLength": 35},
            "const": {"type": "string", "format": "email", "maxLength": 9},
        },
        "const": {"pattern": "(?=a)", "format": "time"},
        "enum": [{"pattern": "(?!a)"}],
    }


@pytest.mark.parametrize(
    ("schema", "meaning"),
    [
        ({"$ref": "#"}, "it allows no answer"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "nothing"}, "nothing"),
        ({"$ref": "http://somewhere/schema.json"}, "somewhere"),
        ({"minimum": 5, "maximum": 3, "type": "integer"}, "greater than maximum"),
    ],
)
def test_a_complaint_says_what_is_wrong_in_one_line(tokens: Tokens, schema: dict[str, Any], meaning: str) -> None:
    start, compiled = _compile(ANSWER + json.dumps({"wanted": schema}).encode(), tokens)
    assert start is None
    assert meaning in compiled.error
    assert "\n" not in compiled.error


@given(st.text(max_size=400))
def test_any_complaint_becomes_one_line(complaint: str) -> None:
    said = explained(complaint)
    assert len(said) <= 200
    assert len(said.splitlines()) <= 1
    assert said
