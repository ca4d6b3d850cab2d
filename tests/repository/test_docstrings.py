"""Everything public says what it does, what shapes its arrays have and what it raises; rules of papers name them."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import atlas_jax

PAPERS = (
    "kernels.omega",
    "kernels.newton_schulz",
    "kernels.feature_maps",
    "memory.presets",
    "memory._exact",
)
_PROMISE = re.compile(r"raise|refuse", re.IGNORECASE)


def public_modules() -> list[str]:
    """All modules without an underscore in their names."""
    found = pkgutil.walk_packages(atlas_jax.__path__, "atlas_jax.")
    return ["atlas_jax", *(m.name for m in found if not any(part.startswith("_") for part in m.name.split(".")))]


def public_objects(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What it exports by `__all__`, else what it defines; classes with their public methods and properties."""
    exported = getattr(module, "__all__", None)
    for name, thing in sorted(vars(module).items()):
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        if name in exported if exported else not name.startswith("_") and thing.__module__ == module.__name__:
            yield f"{module.__name__}.{name}", thing
            if inspect.isclass(thing) and thing.__module__.startswith("atlas_jax"):
                for member, value in sorted(vars(thing).items()):
                    if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                        yield f"{module.__name__}.{name}.{member}", getattr(thing, member)


def own_raises(function: Any) -> bool:
    """Whether the function itself raises something new, its inner functions left out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return False


def bare_arrays(function: Any) -> list[str]:
    """Parameters and the result that are arrays of a shape the signature does not tell."""
    notes = inspect.get_annotations(function)
    return [name for name, note in notes.items() if re.search(r"\b(jax\.Array|np\.ndarray)\b", str(note))]


@pytest.mark.parametrize("name", public_modules())
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    missing, silent, shapeless = [], [], []
    for full, thing in public_objects(module):
        doc = inspect.getdoc(thing) or ""
        if not doc:
            missing.append(full)
        if inspect.isfunction(thing) and thing.__module__.startswith("atlas_jax"):
            if own_raises(thing) and not _PROMISE.search(doc):
                silent.append(full)
            if name.startswith(("atlas_jax.kernels", "atlas_jax.memory")) and bare_arrays(thing) and "[" not in doc:
                shapeless.append(f"{full} {bare_arrays(thing)}")
    assert not missing, "no docstring"
    assert not silent, "says nothing of what it raises"
    assert not shapeless, "no shape in signature or docstring"


@pytest.mark.parametrize("name", PAPERS)
def test_rules_of_papers_name_their_equations(name: str) -> None:
    module = importlib.import_module(f"atlas_jax.{name}")
    assert re.search(r"arXiv \d{4}\.\d{5}", module.__doc__ or "")
