"""What the guides for contributors tell a reader to write works when it is written: every block of their code is run.

A guide adds to modules and tests that are there. Here its blocks are executed in copies of their names, so that nothing is
left behind, and the tests that the guide adds run as they would there.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.kernels import monomials
from atlas_jax.kernels.cpu import ffi, library
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.memory import PRESETS, presets
from atlas_jax.model import families
from tests import tiny_families
from tests.model import test_architectures
from tests.property import (
    test_kernels_cpu_property,
    test_memory_forms_property,
    test_memory_invariants_property,
    test_memory_special_cases_property,
)

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def blocks(guide: str, language: str) -> list[str]:
    """Blocks of code, those in a list too."""
    text = (GUIDES / guide).read_text("utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def written_into(module: ModuleType, code: str, **names: Any) -> dict[str, Any]:
    """The names of a module after a block was appended to it."""
    scope = {**vars(module), **names}
    exec(compile(code, f"a guide's addition to {module.__name__}", "exec"), scope)
    return scope


FAMILY, FAMILY_SAMPLE = blocks("architecture.md", "python")
PRESET, PRESET_TEST, PRESET_USED = blocks("memory-rule.md", "python")
WRAPPER, CHOICE, KERNEL_TEST = blocks("kernel.md", "python")
(KERNEL,) = blocks("kernel.md", "c")


@pytest.fixture
def add_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Callable[[], None]]:
    """Registers a family as a guide has it written, and gives the test that compares it, with llama.cpp's logits."""

    def add(code: str) -> Callable[[], None]:
        monkeypatch.setitem(families.FAMILIES, "cohere2", written_into(families, code)["FAMILY"])  # type: ignore[call-overload]
        sample = written_into(tiny_families, FAMILY_SAMPLE)["_COHERE2"]
        monkeypatch.setitem(tiny_families.SAMPLES, "cohere2", sample)  # type: ignore[call-overload]
        # written by the commands of the guide
        monkeypatch.setattr(test_architectures, "GOLDEN", test_architectures.GOLDEN.with_name("guide"))
        return lambda: test_architectures.test_logits_are_those_of_the_definition_and_of_llama_cpp(tmp_path, "cohere2")

    return add


def test_the_guides_architecture_is_read_and_computed(add_family: Callable[[str], Callable[[], None]]) -> None:
    add_family(FAMILY)()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("interleaved=True", "interleaved=False"),
        ("interleaved=True", "interleaved=True, base=1e4"),
        ("position_scale=0.0", "position_scale=1.0"),
        ("sliding_window=window, rope=0", "rope=0"),
        ("parallel=True", "parallel=False"),
        ('norm="layer"', 'norm="layer", activation="gelu_tanh"'),
        ("logit_scale=fields", "logit_scale=1.0 / fields"),
        ("_PERIOD = 4", "_PERIOD = 2"),
    ],
)
def test_the_guides_test_finds_a_family_that_is_wrong(
    add_family: Callable[[str], Callable[[], None]], right: str, wrong: str
) -> None:
    assert right in FAMILY
    test = add_family(FAMILY.replace(right, wrong))
    with pytest.raises((AssertionError, ValueError)):
        test()


@pytest.fixture
def mamba2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's preset."""
    monkeypatch.setitem(PRESETS, "mamba2", written_into(presets, PRESET)["mamba2"])


@pytest.mark.usefixtures("mamba2")
def test_the_guides_rule_passes_every_test_that_knows_it() -> None:
    with jax.enable_x64(True):
        written_into(test_memory_special_cases_property, PRESET_TEST)["test_mamba2"]()
        test_memory_forms_property.test_chunked_is_the_definition_from_any_token_on("mamba2")
    test_memory_invariants_property.test_causal_row_by_row_and_finite("mamba2")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('objective="dot"', 'objective="l2"'),
        pytest.param("chunk=64", "chunk=64, retention='none'", marks=pytest.mark.slow),
    ],
)
def test_the_guides_test_finds_a_rule_that_is_wrong(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    assert right in PRESET
    code = PRESET.replace(right, wrong)
    monkeypatch.setitem(PRESETS, "mamba2", written_into(presets, code)["mamba2"])
    with jax.enable_x64(True), pytest.raises(AssertionError):
        written_into(test_memory_special_cases_property, PRESET_TEST)["test_mamba2"]()


def test_the_guides_rule_is_used_as_it_says() -> None:
    scope: dict[str, Any] = {}
    exec(compile(PRESET_USED, "docs/guides/memory-rule.md", "exec"), scope)
    assert scope["model"].rule == scope["rule"]


@pytest.mark.skipif(not library.available(), reason="no C compiler, or no AVX-512 VNNI")
def test_the_guides_kernel_is_compiled_chosen_and_right(tmp_path: Path) -> None:
    source, built = tmp_path / "doubled.c", tmp_path / "doubled.so"
    source.write_text(KERNEL)
    compiler = library.compiler()
    assert compiler is not None
    flags = [
        "-std=gnu11",
        "-O2",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-I",
        library.SHIPPED,
        "-I",
        jax.ffi.include_dir(),
    ]
    subprocess.run([compiler, *flags, source, library.SHIPPED / "common.c", "-o", built], check=True)
    capsule = jax.ffi.pycapsule(ctypes.CDLL(str(built)).atlas_doubled)
    jax.ffi.register_ffi_target(f"atlas_doubled_{library.VERSION}", capsule, platform="cpu")

    calls: list[int] = []
    wrapper = written_into(ffi, WRAPPER)["doubled"]

    def counted(x: jax.Array) -> jax.Array:
        calls.append(x.shape[-1])
        return wrapper(x)

    # monomials is an operation's file: it has the imports of one
    doubled = written_into(monomials, CHOICE, ffi=SimpleNamespace(doubled=counted))["doubled"]
    written_into(test_kernels_cpu_property, KERNEL_TEST, doubled=doubled)["test_doubling_has_the_bits_of_xlas"]()
    calls.clear()
    for width in (160, 33):
        doubled(jnp.ones((2, width)))
    with KernelChoice(cpu=False).scope():
        doubled(jnp.ones((2, 16)))
    assert calls == [160], "shapes that the kernel takes, where it may run, and no others"
