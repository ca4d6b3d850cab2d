"""The default model, as `make serve` starts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from tests.e2e.real_server import ROOT, RealServer, content

MODEL = ROOT / "data" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL.name} is not there: run `make model`"),
]


class Country(pydantic.BaseModel):
    """What the official client turns into a strict schema."""

    capital: str
    inhabitants: int


@pytest.fixture(scope="module")
def served(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    server = RealServer(MODEL, cache=cache, folder=tmp_path_factory.mktemp("model"))
    yield server
    server.kill()


def test_the_default_model_answers_a_question(served: RealServer) -> None:
    plain = served.openai.chat.completions.create(
        model=served.name, messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
    )
    assert "Paris" in content(plain)
    assert "�" not in content(plain)
    asked = served.chat(QUESTION, session="trip", max_tokens=24)
    assert "Paris" in content(asked)
    assert asked.atlas_stats["degraded"] is None
    parsed = served.openai.chat.completions.parse(
        model=served.name,
        messages=[{"role": "user", "content": "Describe France: its capital, and how many people live there."}],
        response_format=Country,
        max_tokens=80,
        temperature=0,
    )
    country = parsed.choices[0].message.parsed
    assert country is not None
    assert country.capital


SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {"properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["C", "F"]}}},
    "add": {"properties": {"numbers": {"type": "array", "items": {"$ref": "#/$defs/number"}, "maxItems": 3}}},
    "stop": {"properties": {}},
}
SCHEMAS["add"]["$defs"] = {"number": {"type": "integer", "minimum": 0, "maximum": 999}}


def test_forced_calls_parse_and_continue_their_session(served: RealServer) -> None:
    tools: list[Any] = [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {"type": "object", "required": list(schema["properties"]), **schema},
            },
        }
        for name, schema in SCHEMAS.items()
    ]
    effects = []
    for name, schema in SCHEMAS.items():
        asked: list[Any] = [{"role": "user", "content": f"Use {name}, please: Paris, 5 and 7."}]
        more: dict[str, Any] = {"temperature": 0, "max_tokens": 120, "extra_body": {"atlas": {"session_id": name}}}
        choice: Any = {"type": "function", "function": {"name": name}}
        first = served.openai.chat.completions.create(
            model=served.name, messages=asked, tools=tools, tool_choice=choice, **more
        )
        assert first.choices[0].finish_reason == "tool_calls"
        message = first.choices[0].message
        assert message.tool_calls
        (call,) = message.tool_calls
        assert call.function.name == name
        assert list(json.loads(call.function.arguments)) == list(schema["properties"])
        turns = [
            *asked,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "Done."},
        ]
        second = served.openai.chat.completions.create(model=served.name, messages=turns, tools=tools, **more)
        effects.append(second.atlas_stats["history"])
    # What the model chose it may have spelled in other tokens than its tokenizer does, such as `]}` and `}` for `]` and `}}`.
    assert set(effects) <= {"continued", "rolled_back"}
    assert effects[-1] == "continued"  # all of which the grammar has spelled
