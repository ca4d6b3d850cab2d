"""Documents name what is there: paths, modules, tests, make targets, links, the imports of their code, their diagrams."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import draw_diagrams

ROOT = Path(__file__).parents[2]
FOLDERS = ("atlas_jax", "server", "tests", "benchmarks", "docs", "tools", "examples", "deploy")
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").glob("*.md"),
        *(ROOT / "examples").glob("*.md"),
    )
    if path.name != "CHANGELOG.md"  # says what was, under the names it had
)
INVENTED = {"atlas_jax/model/families/qwen3.py", "evaluation.md"}
"""What a guide has its reader write, or a command writes."""
_FILE = re.compile(r"^[\w.-]*(?:/[\w.-]+)*\.(?:py|c|h|md|toml|yml|yaml|svg|png)$")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(document: str) -> str:
    return (ROOT / document).read_text("utf-8")


def prose(text: str) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """What stands between backticks, outside blocks of code."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose(text))]


def blocks(text: str, language: str) -> list[str]:
    return [
        code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if name == language
    ]


@pytest.fixture(scope="module")
def tree() -> list[str]:
    """Every file and folder, with a slash before and, for folders, one at the end."""
    found = [path for folder in FOLDERS for path in (ROOT / folder, *(ROOT / folder).rglob("*"))]
    names = [
        f"/{path.relative_to(ROOT).as_posix()}" + "/" * path.is_dir() for path in found if path.name != "__pycache__"
    ]
    return names + [f"/{path.name}" for path in ROOT.iterdir() if path.is_file()]


def paths(text: str) -> Iterator[str]:
    """Files and folders that a document names: `kernels/linear.py`, `tests/golden/`, `tests/x.py::test_y`."""
    for span in spans(text):
        name = re.sub(r"(::\w+|:\d+)$", "", span)
        if any(mark in name for mark in " <>*…$"):
            continue
        if _FILE.match(name) or (name.split("/")[0] in FOLDERS and "/" in name):
            yield name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str, tree: list[str]) -> None:
    missing = []
    for name in sorted(set(paths(read(document))) - INVENTED):
        tail = "/" + name.removeprefix("./").rstrip("/")
        exact = name.split("/")[0] in FOLDERS and "/" in name
        hits = [path for path in tree if path.rstrip("/").endswith(tail) and (not exact or path.rstrip("/") == tail)]
        if not hits and not (ROOT / document).parent.joinpath(name).exists():
            missing.append(name)
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_that_are_named_exist(document: str) -> None:
    for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", read(document)):
        assert re.search(rf"^(?:async )?def {test}\(", read(path), re.MULTILINE), f"{path}::{test}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_and_their_names_exist(document: str) -> None:
    for dotted in sorted(
        set(re.findall(r"\b(?<![/.\w])((?:atlas_jax|server|benchmarks)(?:\.[A-Za-z_]\w*)+)", read(document)))
    ):
        if (ROOT / dotted).exists() or (dotted.startswith("server.") and dotted.split(".")[1] in CONFIGURATION):
            continue
        parts = dotted.split(".")
        depth = max(n for n in range(len(parts) + 1) if is_module(parts[:n]))
        assert depth, dotted
        if depth < len(parts) and parts[0] != "benchmarks":  # some need packages that tests do not
            thing = importlib.import_module(".".join(parts[:depth]))
            for name in parts[depth:]:
                assert hasattr(thing, name), dotted
                thing = getattr(thing, name)


CONFIGURATION = {"model"}
"""Keys of the JSON file's section `server` that documents name, `server.model`."""


def is_module(parts: list[str]) -> bool:
    where = ROOT.joinpath(*parts)
    return not parts or where.is_dir() or where.with_suffix(".py").is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_imports_of_the_code_work(document: str) -> None:
    for code in blocks(read(document), "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("atlas_jax", "server"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
                    assert not alias.name.startswith("_"), "a document uses what is private"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    text = read(document)
    used = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)
    assert set(used) <= targets


def anchors(document: str) -> set[str]:
    """Names of a document's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", prose(read(document)), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    for link in _LINK.findall(prose(read(document))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("name", draw_diagrams.DRAWINGS)
def test_diagrams_are_as_they_are_drawn(name: str) -> None:
    drawn = draw_diagrams.DRAWINGS[name]().svg()
    assert drawn == read(f"docs/images/{name}"), "run `make diagrams`"
