"""The command line of the evaluation refuses what it cannot do, and names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from atlas_jax.engine.memory_options import MemoryOptions
from atlas_jax.evaluation import command
from atlas_jax.evaluation.arms import ArmError, chosen_arms, parse_arm
from atlas_jax.evaluation.tasks import TASKS
from server import cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "MODEL.gguf"),
        (["m.gguf", "--hf-repo", "org/name"], "not allowed with"),
        (["m.gguf", "--arm", "half"], "write NAME=JSON"),
        (["m.gguf", "--arm", "half={]"], "arm 'half': the options are not a JSON object"),
        (["m.gguf", "--arm", "half=[1]"], "arm 'half': the options are not a JSON object"),
        (["m.gguf", "--arm", 'half={"window": 256}'], "arm 'half': window is no memory option"),
        (["m.gguf", "--arm", 'half={"blend_ratio": 2}'], "arm 'half': blend_ratio is 2"),
        (["m.gguf", "--arm", 'half={"read": "no"}'], "arm 'half': read is 'no'"),
        (["m.gguf", "--arm", "full={}"], "two arms 'full'"),
        (["m.gguf", "--arms", "half"], "there is no arm 'half'"),
        (["m.gguf", "--tasks", "poetry"], "there is no task 'poetry'"),
        (["m.gguf", "--seeds", "0"], "--seeds must be at least 1"),
        (["m.gguf", "--seeds", "many"], "--seeds"),
        (["m.gguf", "--quick", "--long"], "--long"),
        (["m.gguf", "--fast"], "--fast"),
    ],
)
def test_usage_errors_name_what_is_wrong(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.gguf").write_bytes(b"no model")
    for name in ("no.gguf", "missing.gguf"):
        assert command.main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert name in error or "GGUF" in error
        assert error.count("\n") == 1


def test_a_repository_that_cannot_be_had_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("nobody", "expected org/name"), ("org/name-that-is-not-there", "is not in the cache")):
        assert command.main(["-hf", name, "--offline"]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_server_has_it_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split("  ")[0] for line in listed.splitlines()] == [task.name for task in TASKS]


def test_an_arm_is_the_options_it_names_and_defaults() -> None:
    arm = parse_arm('half={"window_size": 256, "use_muon": true}')
    assert (arm.name, arm.options) == ("half", MemoryOptions(window_size=256, use_muon=True))
    assert arm.params(100).window_size == 256


def test_standard_arms_are_chosen_by_name_and_keep_their_order() -> None:
    assert [arm.name for arm in chosen_arms(["full", "window"], ["mine={}"])] == ["window", "full", "mine"]
    with pytest.raises(ArmError, match="two arms 'mine'"):
        chosen_arms([], ["mine={}", "mine={}"])
