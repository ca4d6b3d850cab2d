"""What runs before a commit and after a push names what is there, and is the same wherever it runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]


def made(commands: str) -> set[str]:
    """Targets that a script makes."""
    lines = [shlex.split(line, comments=True) for line in commands.splitlines() if line.startswith("make ")]
    return {word for line in lines for word in line[1:] if re.fullmatch(r"[a-z][a-z-]*", word)}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_makes_what_the_projects_script_makes(workflow: Path) -> None:
    jobs: dict[str, Any] = yaml.safe_load(workflow.read_text("utf-8"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert made("\n".join(commands)) == made((ROOT / ".ci" / "run").read_text("utf-8"))
    assert made("\n".join(commands)) <= TARGETS


def test_hooks_run_what_the_environment_has() -> None:
    """No hook is downloaded, so that its version cannot differ from the one of `make lint`."""
    assert [repo["repo"] for repo in HOOKS] == ["local"]
    for hook in HOOKS[0]["hooks"]:
        program, *arguments = hook["entry"].split()
        assert hook["language"] == "system"
        assert program in {".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/python"}
        assert all((ROOT / word).is_file() for word in arguments if "/" in word)
