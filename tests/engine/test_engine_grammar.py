"""Answers under a JSON schema, and those beside them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from asking import PATIENCE, ask, ask_all, memory, request, words
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine import Engine
from atlas_jax.engine.api import EngineError, InvalidRequest

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    return (
        list(value) == ["name", "age", "tags"]
        and len(value["name"]) <= 6
        and 0 <= value["age"] <= 120
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b"}
    )


def compiled(engine: Engine, schema: dict[str, Any], owner: str = "") -> Any:
    return engine.json_grammar(schema, owner=owner).result(PATIENCE)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    with_memory=st.booleans(),
    ignore_eos=st.booleans(),
)
def test_an_answer_is_what_its_schema_allows_and_ends(
    engine: Engine, seed: int, temperature: float, with_memory: bool, ignore_eos: bool
) -> None:
    asked = request(
        words(seed, 40),
        400,
        temperature=temperature,
        seed=seed,
        grammar=compiled(engine, PERSON),
        memory=memory() if with_memory else None,
        ignore_eos=ignore_eos,
    )
    answer = ask(engine, asked)
    assert answer.end.reason == "stop"
    assert is_person(json.loads(answer.text))
    assert ask(engine, asked).text == answer.text


def test_neighbours_of_a_constrained_answer_are_free(engine: Engine) -> None:
    free = request(words(1, 50), 30, temperature=0.8, seed=5)
    bound = request(words(2, 20), 300, temperature=0.8, seed=6, grammar=compiled(engine, PERSON))
    one, two, three = ask_all(engine, [free, bound, bound])
    assert one.tokens == ask(engine, free).tokens
    assert is_person(json.loads(two.text))
    assert two.text == three.text == ask(engine, bound).text


def test_a_bounded_answer_may_be_cut_by_its_limit(engine: Engine) -> None:
    answer = ask(engine, request(words(3, 20), 3, grammar=compiled(engine, PERSON)))
    assert answer.end.reason == "length"
    assert answer.text.startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://somewhere/schema.json"},
        {"type": "nothing"},
        {"type": "string", "pattern": "("},
        {"enum": ["x" * 300_000]},
        json.loads('{"properties":{"a":' * 100 + "{}" + "}}" * 100),
    ],
)
def test_a_schema_that_cannot_be_had_is_refused(engine: Engine, schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(engine, schema)
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"type": "string", "pattern": "(a*)*b"},
        {"$ref": "#"},
        {"anyOf": [{"const": str(number) * 9} for number in range(5000)]},
    ],
)
def test_a_hostile_schema_takes_no_more_than_its_answer(engine: Engine, schema: dict[str, Any]) -> None:
    with contextlib.suppress(EngineError):
        answer = ask(engine, request(words(4, 20), 12, grammar=compiled(engine, schema)))
        assert len(answer.tokens) <= 12
    assert ask(engine, request(words(4, 20), 3)).end.completion_tokens == 3
