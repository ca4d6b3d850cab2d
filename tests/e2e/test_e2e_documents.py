"""The commands of docs/README-atlas.md and the examples, with the default model; README.md has `tools.readme_check`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.real_server import ROOT, RealServer
from tools import readme_check

MODEL = ROOT / "data" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_model = pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL.name} is not there: run `make model`")


def blocks(document: str, language: str) -> list[str]:
    """The code of a document in a language, in order."""
    found = readme_check.blocks((ROOT / document).read_text("utf-8"))
    return [block.code for block in found if block.language == language]


def ran(command: list[str], **options: Any) -> str:
    """What a command prints; it must not fail."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ATLAS_")}
    environ |= {"NO_PROXY": "*", "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environ, **options)
    assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
    return ended.stdout


@pytest.mark.model
@pytest.mark.timeout(900)
@needs_model
def test_the_documents_commands_and_the_examples_work_as_printed(cache: Path, tmp_path: Path) -> None:
    server = RealServer(MODEL, cache=cache, folder=tmp_path)
    address = str(server.http.base_url).rstrip("/")
    try:
        curls = [code for code in blocks("docs/README-atlas.md", "sh") if code.startswith("curl")]
        assert len(curls) == 4
        for code in curls:
            script = code.replace("http://127.0.0.1:8080", address).replace("curl ", "curl -sS --fail-with-body ")
            ran(["sh", "-ec", script])
        assert server.contexts() == {}
        sent = blocks("examples/README.md", "python")[0].replace("http://127.0.0.1:8080", address)
        printed = dict(reversed(line.split(" ", 1)) for line in ran([sys.executable, "-c", sent]).splitlines())
        for example in json.loads((ROOT / "examples" / "atlas-examples.json").read_text("utf-8"))["examples"]:
            if "events" not in example:
                assert printed[example["name"]] == str(example["status"])
        assert server.trouble == []
    finally:
        server.kill()


@pytest.mark.parametrize("document", ["docs/README-atlas.md", "README.md", "examples/atlas-config.md"])
def test_flags_variables_and_links_of_the_documents_exist(document: str) -> None:
    from server.config.sources import options

    text = (ROOT / document).read_text("utf-8")
    flags = {option.flag for option in options()} | {"--config", "--print-config", "--help", "--version"}
    flags |= {option.flag.replace("--", "--no-", 1) for option in options() if option.kind is bool}
    used = set(re.findall(r"(?<=`)(--[a-z0-9-]+)", text))
    others = {"--rate-limit-", "--name", "--no-name", "--seed", "--url"}  # families of flags, and other programs'
    assert used - others <= flags
    variables = {option.env for option in options()} | {"ATLAS_CONFIG"}
    assert set(re.findall(r"`(ATLAS_[A-Z0-9_]+)`", text)) <= variables
    for command in re.findall(r"^atlas-jax (serve .+)$", text, re.MULTILINE):
        ran(["sh", "-c", f"{sys.executable} -m server {command} --print-config"])
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target
