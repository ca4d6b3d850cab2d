"""Documents name what is there: paths, modules, classes, functions, flags, tests, make targets, links, imports, diagrams."""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from atlas_jax.memory import PRESETS
from server.config.sources import CONFIG_ENV, options
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
INVENTED = {"atlas_jax/model/families/cohere2.py", "atlas_jax/kernels/doubled.py", "doubled.c", "evaluation.md"}
INVENTED_NAMES = {"mamba2", "doubled", "l1"}
"""What a guide has its reader write; `test_guides.py` writes it; and what a command writes."""
CLOUDS_NAMES = {
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AbortIncompleteMultipartUpload",
}
OTHERS_FLAGS = {"--strict", "--profile", "--build", "--name"}
"""Of mypy and Docker, and what stands for any flag."""
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


@pytest.fixture(scope="module")
def words() -> frozenset[str]:
    """Every word of code, tests, requests and build files, and the variables that settings are read from."""
    kinds = (".py", ".c", ".h", ".json", ".yaml", ".yml", ".html", ".js")
    left_out = (ROOT / "tests" / "golden", ROOT / "tests" / "repository")
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    sources = [path for path in sources if not any(path.is_relative_to(folder) for folder in left_out)]
    text = [path.read_text("utf-8") for path in (*sources, ROOT / "Makefile", ROOT / "pyproject.toml")]
    found = {word for part in text for word in re.findall(r"[A-Za-z_]\w*", part)}
    return frozenset(found | {option.env for option in options()} | {CONFIG_ENV})


@pytest.fixture(scope="module")
def members() -> dict[str, set[str]]:
    """Fields, methods and attributes of every class, by its name."""
    found: dict[str, set[str]] = defaultdict(set)
    for package in ("atlas_jax", "server"):
        for path in (ROOT / package).rglob("*.py"):
            for thing in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(thing, ast.ClassDef):
                    found[thing.name] |= set(_members(thing))
    return found


def _members(thing: ast.ClassDef) -> Iterator[str]:
    for node in thing.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            yield from map(ast.unparse, node.targets if isinstance(node, ast.Assign) else [node.target])
    for node in ast.walk(thing):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_exist(document: str, words: frozenset[str], members: dict[str, set[str]]) -> None:
    """`name`, `module.name` and `name(…)` are words of the sources, and `Class.member` is a member of its class."""
    missing = []
    for span in spans(read(document)):
        name = re.sub(r"\(.*\)$", "", span)
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            continue
        parts = name.split(".")
        unknown = not set(parts) <= words | INVENTED_NAMES | CLOUDS_NAMES
        no_member = len(parts) > 1 and parts[-2] in members and parts[-1] not in members[parts[-2]]
        if unknown or no_member:
            missing.append(name)
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_exist(document: str) -> None:
    """Flags of the server, and of the programs beside it."""
    programs = [path for folder in FOLDERS if folder != "tests" for path in (ROOT / folder).rglob("*.py")]
    known = {flag for path in programs for flag in re.findall(r"[\"'](--[a-z][\w-]*)[\"']", path.read_text("utf-8"))}
    known |= OTHERS_FLAGS | {option.flag for option in options()}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(document)))
    assert {flag for flag in named - known if flag.replace("--no-", "--") not in known} == set()


def test_the_guide_has_a_place_for_the_architectures() -> None:
    """The site's hook puts the table there."""
    assert "\n<!-- architectures -->\n" in read("docs/guides/serve.md")


def test_every_preset_is_in_readmes_list() -> None:
    (sentence,) = re.findall(r"^`presets` has ([^.]+)\.", read("README.md"), re.MULTILINE)
    assert re.findall(r"`(\w+)`", sentence) == list(PRESETS)


def test_the_layout_is_the_one_that_is_there() -> None:
    (layout,) = blocks(read("README.md"), "text")
    named = set()
    for line in layout.splitlines():
        first = line.split()[0]
        for path in re.findall(r"[\w./-]+(?:/(?=\W|$)|\.py\b)", line):
            places = {ROOT / path, ROOT / first / path}
            assert any(place.exists() for place in places), f"{path} in: {line}"
            named |= places
    packages = {path.parent for path in (ROOT / "atlas_jax").glob("*/__init__.py")}
    assert packages - named == set()


def test_every_folder_of_tests_is_described() -> None:
    described = set(re.findall(r"`tests/(\w+)`", read("CONTRIBUTING.md")))
    assert described == {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"
    }


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
