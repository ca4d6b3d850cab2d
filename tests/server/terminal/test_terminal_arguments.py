"""Command lines: help, mistakes, missing packages, and what shells complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import main
from server.terminal.commands import COMMANDS
from server.terminal.completion import whole

ROOT = Path(__file__).parents[3]


# The evaluation says nothing before it has imported JAX.
@pytest.mark.parametrize("name", ["serve", *(name for name in COMMANDS if name != "eval")])
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: atlas-jax")
    bare = [line for line in shown.splitlines() if re.match(r"^  (-\S+(, )?)+( [A-Z]\S*)?$", line)]
    for line in bare:  # a flag alone on its line has its help on the next
        assert re.search(re.escape(line) + r"\n {20,}\S", shown), f"{line} has no help"


@pytest.mark.parametrize("action", ["list", "show", "export", "import", "verify", "prune"])
def test_every_action_on_sessions_has_its_help(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sessions", action, "--help"])
    assert "--memory-path" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chta"], "unknown command 'chta'; did you mean chat?"),
        (["chat", "--sesion", "x"], "unknown flag --sesion; did you mean --session?"),
        (["chat", "m.gguf", "n.gguf"], "unexpected argument 'n.gguf'"),
        (["chat", "--set", "temprature=1"], "there is no field 'temprature'; did you mean temperature?"),
        (["chat", "--set", "top_p"], "--set wants NAME=VALUE, got 'top_p'"),
        (["generate", "m", "p", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["generate", "m", "p", "--temperature", "500"], "temperature: value must be between 0 and 100"),
        (["generate", "m", "p", "--system", "x"], "--system needs --chat: a plain completion has no messages"),
        (["generate", "--url", "x", "m", "p"], "--url and a model are given: which of them is to answer?"),
        (["generate", "--url", "ftp://x", "p"], "--url must begin with http:// or https://, got 'ftp://x'"),
        (["generate", "--url", "x", "--threads", "2", "p"],
         "--threads says how a model is opened here, --url that none is"),
        (["inspect"], "the following arguments are required: FILE|FOLDER"),
        (["inspect", "x", "--tensor"], "unknown flag --tensor; did you mean --tensors?"),
        (["sessions", "lst"], "COMMAND 'lst' is not known; did you mean list?"),
        (["sessions", "prune", "--older-thn", "3d"], "unknown flag --older-thn; did you mean --older-than?"),
        (["bench"], "one model is to be named: MODEL, or --hf-repo"),
        (["bench", "m", "--rounds", "0"], "--rounds must be at least 1, and --streams from 1 to 256"),
        (["completion", "bsh"], "SHELL 'bsh' is not known; did you mean bash?"),
        (["completion", "cmd"], "SHELL 'cmd' is not known; there are bash, zsh, fish"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code = main(arguments)
    shown = capsys.readouterr()
    prog = f"atlas-jax {arguments[0]}" if arguments[0] in COMMANDS else "atlas-jax"
    assert (code, shown.out, shown.err) == (2, "", f"{prog}: error: {said}\n")


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("rich", ["sessions", "list", "--memory-path", "."]),
        ("httpx", ["generate", "--url", "http://127.0.0.1:1", "x"]),
        ("shtab", ["completion", "bash"]),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(missing: str, arguments: list[str]) -> None:
    """In a process of its own: a package that has been imported before would be there."""
    code = f"import sys; sys.modules[{missing!r}] = None; from server.cli import main; sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=ROOT)
    said = f"{missing} is not installed; it comes with the extra 'serve': pip install 'atlas-jax[serve]'"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"atlas-jax: error: {said}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_every_command_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("serve", *COMMANDS, "prune"):
        assert re.search(rf"\b{word}\b", script), word
    for flag in ("memory-path", "older-than", "schema", "atlas-max-window"):
        assert flag in script
    interpreter = shutil.which(shell)
    if interpreter is not None:
        checked = subprocess.run([interpreter, "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


def test_bash_completes_what_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    main(["completion", "bash"])
    script = capsys.readouterr().out
    ask = (
        f'{script}\nCOMP_WORDS=(atlas-jax sessions pr); COMP_CWORD=2; _shtab_atlas_jax; echo "${{COMPREPLY[@]}}"\n'
        'COMP_WORDS=(atlas-jax generate --max); COMP_CWORD=2; _shtab_atlas_jax; echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run([bash, "--norc"], input=ask, text=True, capture_output=True)
    assert done.stdout.splitlines() == ["prune", "--max-tokens"], done.stderr


def test_one_parser_has_every_commands_flags() -> None:
    given = whole().parse_args(["sessions", "prune", "--older-than", "3d"])
    assert (given.command, given.older_than) == ("prune", "3d")
