"""The check for accelerators goes on after a part that fails or hangs, keeps what it has found, and runs here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.accelerator import __main__ as check
from benchmarks.accelerator.kernel_part import KERNELS
from benchmarks.accelerator.machine_part import peak
from tests.e2e.real_server import ROOT

PART = """
import json, sys, time
name, file = sys.argv[1], sys.argv[sys.argv.index("--found") + 1]
with open(file, "a") as found:
    found.write(json.dumps({"what": "first", "found": "1", "ok": name != "wrong"}) + "\\n")
if name == "fails":
    raise SystemExit("out of memory")
if name == "hangs":
    time.sleep(600)
"""


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_part.py").write_text(PART)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_part"


@pytest.mark.parametrize(
    ("name", "seconds", "ok", "ended"),
    [
        ("works", 60.0, True, "done"),
        ("wrong", 60.0, False, "done"),
        ("fails", 60.0, False, "failed with code 1"),
        ("hangs", 1.0, False, "out of time"),
    ],
)
def test_a_part_is_told_of_however_it_ends(part: str, name: str, seconds: float, ok: bool, ended: str) -> None:
    found = check.run_part(name, seconds, [], module=part)
    assert (found["ok"], found["ended"]) == (ok, ended)
    assert [result["found"] for result in found["results"]] == (["1"] if name != "hangs" or found["results"] else [])
    assert ("out of memory" in found.get("log", "")) == (name == "fails")
    assert ended in check.table([found])


def test_a_device_is_known_by_the_name_that_jax_has_for_it() -> None:
    assert peak("NVIDIA H200") == (4800, 989)
    assert peak("NVIDIA H100 PCIe") == (2000, 756)
    assert peak("TPU v5 lite") == (819, 197)
    assert peak("TPU v5") == peak("TPU v5p")
    assert peak("cpu") is None


def test_every_kernel_is_checked() -> None:
    modules = {file.stem for file in (ROOT / "atlas_jax/kernels").glob("*.py")} | {"gpu"}
    checked = {module for kernel in KERNELS.values() for module in kernel.modules}
    assert checked == modules - {"__init__", "kernel_choice", "lowering_platform"}


@pytest.mark.slow
def test_all_parts_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerator", "--quick", "--output", str(tmp_path)])
    monkeypatch.setattr(check, "PARTS", dict.fromkeys(check.PARTS, 600))
    assert check.main() == 0, (tmp_path / "accelerator.md").read_text()
    parts = json.loads((tmp_path / "accelerator.json").read_text())
    assert [one["part"] for one in parts] == list(check.PARTS)
    assert all(one["results"] for one in parts)
