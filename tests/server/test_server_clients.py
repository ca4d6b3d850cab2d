"""Flows of client libraries, as `make clients` runs them for twenty, with those that are small enough for every run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.clients import __main__ as runner
from benchmarks.clients.flows import KINDS, Servers, run
from benchmarks.clients.scripted import Scripted, example

FOLDER = Path(runner.__file__).parent / "python"
CLIENTS = ("anthropic", "ollama", "openai")
# Kinds that take seconds: a process of its own, and answers of thousands of tokens. What else OpenAI's client does
# test_server_openai_client has in more detail.
SLOW = {name: {"example", "cancel"} for name in CLIENTS}
SLOW["openai"] |= {"chat", "stream", "embeddings", "responses", "sessions", "models"}


def module(name: str) -> ModuleType:
    """A client's script; it has its package's name, so it is no module of ours."""
    spec = importlib.util.spec_from_file_location(f"flows_of_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


MODULES = {name: module(name) for name in CLIENTS}
FLOWS = [
    pytest.param(
        name, flow, marks=[pytest.mark.slow] if flow.partition(":")[0] in SLOW[name] else [], id=f"{name}: {flow}"
    )
    for name, found in MODULES.items()
    for flow in found.client.flows
]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    scripted = Scripted(lambda: None)
    yield Servers(scripted.url, scripted.url, scripted.control)
    scripted.stop()


@pytest.mark.parametrize(("name", "flow"), FLOWS)
def test_flow(servers: Servers, name: str, flow: str) -> None:
    servers.script()
    run(MODULES[name].client.flows[flow], servers)


# --- the runner -------------------------------------------------------------------------------------------------------
def test_every_script_names_its_packages_and_every_flow_is_of_a_kind() -> None:
    for script in FOLDER.glob("*.py"):
        assert runner.packages(script), script
        text = script.read_text("utf-8")
        assert "@client.flow(" in text
        assert 'if __name__ == "__main__":\n    client.main()' in text
    for found in MODULES.values():
        assert {flow.partition(":")[0] for flow in found.client.flows} <= set(KINDS)


def test_the_table_says_what_failed() -> None:
    rows = {
        "one": [
            {"version": "1.0", "flow": "chat", "ok": True, "why": None},
            {"version": "1.0", "flow": "tools", "ok": True, "why": None},
            {"version": "1.0", "flow": "tools: streamed", "ok": False, "why": "TypeError: no"},
        ],
        "two": [],
    }
    page = runner.table(rows).splitlines()
    head, one, two = ([cell.strip() for cell in page[at].split("|")[1:-1]] for at in (0, 2, 3))
    assert dict(zip(head, one, strict=True)) == {
        **dict.fromkeys(KINDS, ""), "client": "one", "version": "1.0", "chat": "✓", "tools": "✗",
    }  # fmt: skip
    assert set(two) == {"two", ""}
    assert page[-1] == "- one, tools: streamed: TypeError: no"


def test_examples_of_schemas_follow_them() -> None:
    schema = {
        "$defs": {"Place": {"type": "object", "properties": {"name": {"type": "string"}}}},
        "type": "object",
        "properties": {
            "where": {"$ref": "#/$defs/Place"},
            "kind": {"enum": ["river", "sea"]},
            "lengths": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
        },
    }
    assert example(schema) == {"where": {"name": "text"}, "kind": "river", "lengths": [7]}
