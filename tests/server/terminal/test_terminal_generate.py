"""`atlas-jax generate`: what is asked, what is written, and the exit code."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from server.cli import main
from tests.server.live_server import Live


def generate(live: Live, *arguments: str) -> int:
    return main(["generate", "--url", live.url, *arguments])


def test_a_completion_is_written_as_it_is(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    live.engine.script = [" Paris."]
    assert generate(live, "The capital is", "--seed", "5", "--temperature", "0", "--max-tokens", "9") == 0
    assert capsys.readouterr().out == " Paris.\n"
    request = live.engine.requests[-1]
    assert bytes(request.prompt) == b"The capital is"
    assert (request.sampling.seed, request.sampling.temperature, request.max_tokens) == (5, 0.0, 9)
    assert request.memory is None


def test_a_chat_has_messages_and_ends_by_itself(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    live.engine.script = ["Hi\n"]
    assert generate(live, "--chat", "--system", "Be kind.", "Hello", "--set", "atlas.blend_ratio=1") == 0
    assert capsys.readouterr().out == "Hi\n"
    assert [one["content"] for one in live.engine.written[0]] == ["Be kind.", "Hello"]
    assert live.engine.requests[-1].memory.blend_ratio == 1


def test_the_prompt_may_come_from_stdin(
    live: Live, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from ü\n".encode())))
    live.engine.script = ["ok"]
    assert generate(live, "-") == 0
    assert bytes(live.engine.requests[-1].prompt).decode() == "from ü\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert generate(live, "-") == 1
    assert capsys.readouterr().err == "atlas-jax generate: error: there is no prompt on stdin\n"


def test_json_is_the_whole_response(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    live.engine.script = ["abc"]
    assert generate(live, "x", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["choices"][0]["text"] == "abc"
    assert answer["usage"]["completion_tokens"] == 3


def test_a_schema_is_followed_and_an_answer_that_was_cut_off_is_an_error(
    live: Live, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}}))
    live.engine.script = ['{"a": 1}']
    assert generate(live, "x", "--schema", str(schema)) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert live.engine.requests[-1].grammar.schema.schema["properties"] == {"a": {"type": "integer"}}
    live.engine.script = ['{"a": 1}']
    assert generate(live, "x", "--schema", str(schema), "--max-tokens", "3") == 1
    assert capsys.readouterr().err == (
        "atlas-jax generate: error: the answer was cut off before it was whole: give it more with --max-tokens\n"
    )


@pytest.mark.parametrize("content", ["", "[1]", "{", '"x"', "\xff"])
def test_a_schema_that_is_none_is_refused_before_anything_is_loaded(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(content, "latin-1")
    assert main(["generate", str(tmp_path / "none.gguf"), "x", "--schema", str(schema)]) == 2
    assert capsys.readouterr().err.startswith(f"atlas-jax generate: error: --schema {schema}: ")


def test_what_the_server_refuses_is_said(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(live, "y" * 5000) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "the prompt has 5000" in shown.err
