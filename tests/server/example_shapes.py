"""The examples of `examples/atlas-examples.json`, and whether an answer is of the shape that one shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
# Where drafts are made at all.
_SOMETIMES = {"draft_n", "draft_n_accepted"}


def examples() -> list[dict[str, Any]]:
    """Every example, in order."""
    found: list[dict[str, Any]] = json.loads((ROOT / "examples" / "atlas-examples.json").read_text("utf-8"))["examples"]
    return found


def differences(shown: Any, found: Any, at: str = "$") -> list[str]:
    """How the shape of an answer differs from the one shown: missing fields, added ones, other types."""
    if isinstance(shown, dict) and isinstance(found, dict):
        names = (shown.keys() ^ found.keys()) - _SOMETIMES
        own = [f"{at}.{name}" for name in sorted(names)]
        return own + [
            one for name in shown.keys() & found.keys() for one in differences(shown[name], found[name], f"{at}.{name}")
        ]
    if isinstance(shown, list) and isinstance(found, list):
        return [one for item in found if shown for one in differences(shown[0], item, f"{at}[]")]
    kinds = {_kind(shown), _kind(found)} - {"null"}
    return [] if len(kinds) <= 1 else [f"{at}: {kinds}"]


def run(client: httpx.Client, example: dict[str, Any]) -> list[str]:
    """Sends an example; how what comes back differs from what it shows."""
    call: dict[str, Any] = {"headers": example.get("headers")}
    if "request" in example:
        call["json"] = example["request"]
    if "events" not in example:
        answer = client.request(example["method"], example["path"], **call)
        if answer.status_code != example["status"]:
            return [f"status {answer.status_code}: {answer.text}"]
        return differences(example["response"], answer.json())
    events = []
    with client.stream(example["method"], example["path"], **call) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
            if len(events) >= len(example["events"]) and example["method"] == "GET":
                break
    if answer.status_code != example["status"]:
        return [f"status {answer.status_code}"]
    shown = example["events"]
    return differences(shown[0], events[0]) + differences(shown[-1], events[-1])


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else type(value).__name__
