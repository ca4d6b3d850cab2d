"""Hook of the documentation site (mkdocs.yml): documents from outside `docs/` become pages, and links between files hold.

Documents link to one another as files of the repository do. On the site README.md is the first page, `docs/` is the root,
and a linked file that is no page (a licence, a source, a configuration) is copied beside them. The tutorial, a script in
cells, is turned into a page. The list of architectures is made of the families that are registered.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from atlas_jax.model.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/README.md": "deploy/index.md",
    "deploy/kubernetes/README.md": "deploy/kubernetes.md",
    "examples/README.md": "examples/index.md",
    "examples/atlas-config.md": "examples/atlas-config.md",
    "docs/tutorial.py": "tutorial.md",
}
"""Where on the site a file of the repository is, unless it lies in `docs/` and keeps its place there."""
_ARCHITECTURES = "<!-- architectures -->"
_LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside `docs/`, and the files that any page links to."""
    tutorial = files.get_file_from_path("tutorial.py")
    if tutorial is not None:
        files.remove(tutorial)
    for source, target in PAGES.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, target, content=_cells(text) if source.endswith(".py") else text))
    linked = {other for file in files.documentation_pages() for other in _linked(_source(file.src_uri))}
    for other in sorted(linked):
        if files.get_file_from_path(_site(other)) is None and (ROOT / other).is_file():
            files.append(File.generated(config, _site(other), abs_src_path=str(ROOT / other)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages, and lists the architectures."""
    source = _source(page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        target = _resolved(source, match[2])
        if target is None:
            return match[0]
        here = posixpath.dirname(page.file.src_uri)
        return match[1] + posixpath.relpath(_site(target), here or ".") + match[3]

    return _LINK.sub(changed, markdown).replace(_ARCHITECTURES, architectures())


def architectures() -> str:
    """The table of the architectures that are read."""
    rows = [f"| `{name}` | {family.models} |" for name, family in FAMILIES.items()]
    return "\n".join(["| `general.architecture` | models |", "|---|---|", *rows])


def _linked(source: str) -> Iterator[str]:
    """Files of the repository that a document links to."""
    for match in _LINK.finditer((ROOT / source).read_text("utf-8")):
        target = _resolved(source, match[2])
        if target is not None:
            yield target


def _resolved(source: str, target: str) -> str | None:
    """What a document's link names, from the repository's root; None where that is no file of the repository."""
    if "://" in target or target.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if not path.startswith("..") and os.path.exists(ROOT / path) else None


def _site(source: str) -> str:
    return PAGES.get(source, source.removeprefix("docs/"))


def _source(page: str) -> str:
    for source, target in PAGES.items():
        if target == page:
            return source
    return f"docs/{page}" if (ROOT / "docs" / page).exists() else page


def _cells(script: str) -> str:
    """A script of `# %%` cells as Markdown."""
    page = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            page.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
        else:
            page.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(page) + "\n"
