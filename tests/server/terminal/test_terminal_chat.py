"""`atlas-jax chat` as a person meets it: at a terminal, and in a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE
from tests.server.live_server import Live, Start, wait_for
from tests.server.terminal.pty_terminal import CTRL_C, CTRL_D, ROOT, terminal


def run(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """The command in a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        timeout=PATIENCE,
    )


def test_a_conversation_at_a_terminal(live: Live, tmp_path: Path) -> None:
    """One long visit, for each start takes a second: answers, commands, Ctrl-C, messages of several lines, Ctrl-D."""
    engine: Any = live.engine
    state = {"XDG_STATE_HOME": str(tmp_path)}
    with terminal("chat", "--url", live.url, "-s", "Ünïcode 名前", "--set", "seed=3", **state) as shown:
        shown.see("Session Ünïcode 名前 is new.")
        shown.see(">>> ")
        engine.script = ["Rivers\x1b[31m flow."]
        said = shown.say("Name a river", answer="flow.")
        assert "\\x1b[31m" in said, "what a model writes must not command the terminal"
        assert "tok/s" in said
        assert "kept pairs" in shown.say("/stats", answer="last answer")
        assert "名前" in shown.say("/sessions", answer="used")
        assert "temperature: value must be between 0 and 100" in shown.say("/set temperature 500", answer="100")
        shown.say("/set temprature 1", answer="did you mean temperature?")
        shown.say("/set temperature 0.2", answer="temperature = 0.2")
        shown.say("/statz", answer="did you mean /stats?")
        shown.say("/system Be brief.", answer="Be brief.")

        engine.script, engine.delay = ["x" * 4000], 0.005
        cancels = engine.cancels
        shown.type("go on\r")
        shown.see("xxx")
        shown.type(CTRL_C)
        shown.see("(stopped)")
        shown.see(">>> ")
        wait_for(lambda: engine.cancels > cancels and engine.running == 0)
        engine.delay = 0.0

        engine.script = ["Better."]
        shown.say("/regenerate", answer="Better.")
        assert engine.requests[-1].memory.regenerate
        assert engine.requests[-1].sampling.temperature == 0.2
        shown.say("/undo", answer="Taken back: go on")
        shown.say("/branch other", answer="stays as it is.")
        engine.script = ["drei"]
        shown.type('"""eins\r')
        shown.see("... ")
        shown.say('zwei"""', answer="drei")
        assert [one["content"] for one in engine.written[0]][-1] == "eins\nzwei"
        assert engine.requests[-1].memory.session.session_id == "other"
        engine.script = ["ok"]
        shown.type("\x1b[200~pasted\nlines\x1b[201~")  # as terminals mark what is pasted
        shown.say("", answer="ok")
        assert engine.written[0][-1]["content"] == "pasted\nlines"
        engine.script = ["ok"]
        shown.say("//etc/hosts?", answer="ok")
        assert engine.written[0][-1]["content"] == "/etc/hosts?"
        shown.type("half a line")
        shown.see("half a line")
        shown.interrupt("Ctrl-D or /exit leaves.")
        shown.see(">>> ")
        shown.type(CTRL_D)
        assert shown.end() == 0
    history = (tmp_path / "atlas-jax" / "history").read_text("utf-8").splitlines()
    assert json.loads(history[0]) == "Name a river"
    assert "eins\nzwei" in [json.loads(line) for line in history]
    for file in (tmp_path / "atlas-jax").rglob("*"):
        assert file.stat().st_mode & 0o077 == 0 or file.is_dir()

    with terminal("chat", "--url", live.url, "-c", columns=24, **state) as shown:  # narrow, and another day
        shown.see("goes on")
        shown.see(">>> ")
        shown.type("\x1b[A\x1b[A\x1b[A")  # up: the history is there
        shown.see("pasted")
        shown.interrupt("leaves.")
        shown.see(">>> ")
        shown.say("/help", answer="leaves.")
        shown.say("/stats", answer="when full")
        shown.type("/exit\r")
        assert shown.end() == 0


def test_a_pipe_gets_the_answer_and_nothing_else(live: Live) -> None:
    live.engine.script = ["Eins.\nZwei \x1b ü"]
    done = run("chat", "--url", live.url, stdin="count\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Eins.\nZwei \x1b ü\n", "")
    assert live.engine.written[0] == [{"role": "user", "content": "count"}]
    assert live.engine.requests[-1].memory.session is None


def test_a_pipe_can_go_on_with_a_session(live: Live, tmp_path: Path) -> None:
    for text in ("one", "two"):
        live.engine.script = [text.upper()]
        done = run("chat", "--url", live.url, "-s", "s", stdin=text, XDG_STATE_HOME=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, f"{text.upper()}\n")
    assert live.engine.written[0] == [{"role": "user", "content": "two"}]


def test_what_goes_wrong_is_one_line_and_an_exit_code(live: Live, start: Start, tmp_path: Path) -> None:
    assert run("chat", "--url", live.url).stderr == "atlas-jax chat: error: there is no prompt on stdin\n"
    gone = run("chat", "--url", "127.0.0.1:1", stdin="x")
    assert gone.returncode == 1
    assert gone.stderr.startswith("atlas-jax chat: error: http://127.0.0.1:1 cannot be reached: ")
    assert len(gone.stderr.splitlines()) == 1
    keys = tmp_path / "keys"
    keys.write_text("secret-key-of-ada:ada\n")
    closed = start(server={"api_keys_file": str(keys)})
    refused = run("chat", "--url", closed.url, stdin="x")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "key" in refused.stderr
    assert run("chat", "--url", closed.url, stdin="x", ATLAS_API_KEY="secret-key-of-ada").returncode == 0
    missing = run("chat", str(tmp_path / "none.gguf"), stdin="x")
    assert missing.returncode == 2
    assert missing.stderr == f"atlas-jax chat: error: model {tmp_path}/none.gguf: No such file or directory\n"


@pytest.mark.slow
def test_a_model_in_this_process_remembers_across_starts(tmp_path: Path) -> None:
    from tests import tiny_model

    model = tiny_model.write_model(tmp_path / "tiny.gguf")
    adapter = tiny_model.write_adapter(tmp_path / "tiny.safetensors", model)
    state = {"XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "ATLAS_ADAPTER": str(adapter)}
    state["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    flags = ("chat", str(model), "-s", "s", "--set", "max_tokens=8")
    first = run(*flags, stdin="the window reads", **state)
    assert (first.returncode, first.stderr) == (0, "")
    listed = run("sessions", "list", "--json", **state)
    (row,) = json.loads(listed.stdout)
    assert (row["session"], row["owner"], row["turns_in_journal"], row["problem"]) == ("s", "local", 0, None)
    second = run(*flags, stdin="the memory", **state)
    assert second.returncode == 0
    (again,) = json.loads(run("sessions", "list", "--json", **state).stdout)
    assert again["tokens"] > row["tokens"]
    assert run("sessions", "verify", **state).returncode == 0
