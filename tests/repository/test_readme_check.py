"""What `make readme-check` does with a block follows from the block, and no broken one passes."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tools import readme_check
from tools.bare_clone import Failed, clone, environment, reuse, shell
from tools.readme_check import Block, Newcomer, blocks, check, check_languages, check_ports, recall

ROOT = Path(__file__).parents[2]
_SERVER = """\
import http.server, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/here" else 404)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(f"Ready: http://127.0.0.1:{server.server_port} (model none)", flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    pathlib.Path("stopped").touch()
"""
_APP = """\
async def app_(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    status = 200 if scope["path"].startswith("/llm/") else 404
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})

app = app_  # /llm/v1/here
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What stands for a clone."""
    target = tmp_path / "clone"
    target.mkdir()
    (target / ".venv").symlink_to(sys.prefix)
    (target / "serve.py").write_text(_SERVER)
    return target


@pytest.fixture
def newcomer(folder: Path, tmp_path: Path) -> Iterator[Newcomer]:
    made = Newcomer(folder, tmp_path)
    yield made
    made.close()


def sh(code: str) -> Block:
    return Block("sh", code, 1)


def python(code: str) -> Block:
    return Block("python", code, 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_every_block_is_found_with_its_language_and_line() -> None:
    text = "# A\n\n```sh\nmake\n```\n\n- b\n\n  ```python\n  x = 1\n  ```\n\n~~~text\ntree\n~~~\n\n````\n```sh\n````\n"
    assert blocks(text) == [
        Block("sh", "make\n", 4),
        Block("python", "x = 1\n", 10),
        Block("text", "tree\n", 14),
        Block("", "```sh\n", 18),
    ]


def test_a_block_without_a_language_that_is_run_or_shown_is_an_error() -> None:
    check_languages(blocks("```sh\na\n```\n```python\nb\n```\n```text\nc\n```\n"))
    for text, named in (("```\nmake serve\n```", "no language"), ("```json\n{}\n```", "json")):
        with pytest.raises(Failed, match=rf"README.md:2 \({named}\)"):
            check_languages(blocks(text))


def test_the_readmes_own_blocks_say_what_they_are() -> None:
    found = blocks((ROOT / "README.md").read_text("utf-8"))
    check_languages(found)
    assert {block.language for block in found} == {"sh", "python", "text"}
    assert [block.prints for block in found if block.prints] == [["40713"]]
    (app,) = (block for block in found if block.language == "python" and block.is_application)
    assert app.paths == ["/llm/v1/chat/completions", "/llm/v1/atlas/status"]


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Failed, match=rf"port {port} of 127\.0\.0\.1 is in use"):
            check_ports([sh(f"curl http://127.0.0.1:{port}/ready")])
    check_ports([sh(f"curl http://127.0.0.1:{port}/ready")])


@pytest.mark.parametrize(
    ("code", "free"),
    [
        ("import os\nprint(os.name)", set()),
        ("client.ask(model)", {"client", "model"}),
        ("def ask(text):\n    return client.send(text, kind)\n\nkind = 1\n", {"client"}),
        ("from a import b as c\nfor x in c:\n    y = [z for z in x]\n", set()),
        ("class A:\n    b = 1\n    def c(self):\n        return self.b, d\n", {"d"}),
        ("def f():\n    return later()\n\ndef later():\n    return len([])\n", set()),
    ],
)
def test_names_a_block_takes_from_the_one_before(code: str, free: set[str]) -> None:
    assert python(code).free == free


def test_a_python_block_goes_on_only_where_it_must(newcomer: Newcomer) -> None:
    assert newcomer.run(python("word = 'kept'\nprint(word)"), []) == "kept\n"
    assert newcomer.run(python("print(word.upper())"), []) == "KEPT\n"
    assert newcomer.run(python("import builtins\nprint('word' in globals())"), []) == "False\n"
    with pytest.raises(Failed, match="NameError: name 'word' is not defined"):
        newcomer.run(python("print(word)"), [])


def test_an_error_in_a_block_has_its_line_and_its_text(newcomer: Newcomer) -> None:
    with pytest.raises(Failed, match=r'(?s)README.md:1 \(python\) import os.*File "README.md:1", line 2.*ZeroDivision'):
        newcomer.run(python("import os\n1 / 0"), [])
    with pytest.raises(Failed, match="ended with status 3"):
        newcomer.run(python("import os\nos._exit(3)"), [])


def test_a_shell_block_fails_at_its_first_error(newcomer: Newcomer, folder: Path) -> None:
    assert newcomer.run(sh("echo one; pwd"), []) == f"one\n{folder}\n"
    with pytest.raises(Failed, match=r"(?s)ended with status 1 and printed:\nbefore\n$"):
        newcomer.run(sh("echo before\nfalse\necho after"), [])
    with pytest.raises(Failed, match="ended with status 127"):
        newcomer.run(sh("no-such-command-here | cat"), [])


def test_what_should_be_printed_must_be(newcomer: Newcomer) -> None:
    check(newcomer, [python("print(6 * 7)  # prints 42"), Block("text", "a tree", 1)])
    with pytest.raises(Failed, match=r"(?s)should print 43; it printed:\n42"):
        check(newcomer, [python("print(6 * 7)  # prints 43")])


def test_a_server_runs_as_long_as_blocks_name_its_address_and_ends_with_control_c(
    newcomer: Newcomer, folder: Path
) -> None:
    port = free_port()
    curl = sh(f"curl http://127.0.0.1:{port}/here")
    newcomer.run(sh(f"{sys.executable} serve.py {port}"), [curl])
    newcomer.run(curl, [curl])
    with pytest.raises(Failed, match=r"(?s)404.*The server http.*printed:"):
        newcomer.run(sh(f"curl http://127.0.0.1:{port}/nowhere"), [curl])  # curl itself would be content
    assert not (folder / "stopped").exists()
    newcomer.run(curl, [sh("echo done")])
    assert (folder / "stopped").exists()
    with pytest.raises(Failed, match="status 7"):
        newcomer.run(curl, [])


def test_an_application_is_served_and_asked_for_the_paths_it_names(newcomer: Newcomer) -> None:
    assert newcomer.run(python(_APP), []) == "/llm/v1/here 200"
    with pytest.raises(Failed, match="/other is answered with 404"):
        newcomer.run(python(_APP.replace("/llm/v1/here", "/llm/v1/here, /other")), [])
    with pytest.raises(Failed, match="names a path"):
        newcomer.run(python(_APP.replace("  # /llm/v1/here", "")), [])
    with pytest.raises(Failed, match="RuntimeError: no engine"):
        newcomer.run(python("raise RuntimeError('no engine')\napp = None  # /llm"), [])


def test_recall_counts_sessions_of_their_own_names(newcomer: Newcomer) -> None:
    first = python("asked = []")
    asking = python(
        'asked.append({"session_id": "notes"})\n'
        'assert len({one["session_id"] for one in asked}) == len(asked)\n'
        'print("no" if len(asked) % 4 == 0 else 40713)  # prints 40713\n'
    )
    assert recall(newcomer, [first, asking, python("1 / 0")], 8) == 6
    with pytest.raises(Failed, match="no block names a session"):
        recall(newcomer, [first], 8)


def test_a_clone_has_what_git_keeps_and_sees_installed_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (source / "kept").touch()
    subprocess.run([*git, "add", "kept"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "one"], check=True)
    (source / "not-kept").touch()
    (source / "data" / "models").mkdir(parents=True)
    (source / "data" / "models" / "a.gguf").touch()
    target = clone(tmp_path / "clone", source)
    assert {path.name for path in target.iterdir()} == {".git", "kept"}
    reuse(target, Path(sys.prefix), source)
    assert (target / "data" / "models" / "a.gguf").exists()
    shell(".venv/bin/python -c 'import pytest'", target, environment()).wait(60)
    own = [".venv/bin/python", "-c", "import sys; print(sys.prefix)"]
    prefix = subprocess.run(own, cwd=target, check=True, capture_output=True, text=True).stdout.strip()
    assert Path(prefix).samefile(target / ".venv")


def test_the_environment_of_a_newcomer_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATLAS_PORT", "MAKEFLAGS", "PYTHONPATH", "VENV"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NO_PROXY", "example.org")
    environ = environment(HOME="/h")
    assert not {"ATLAS_PORT", "MAKEFLAGS", "PYTHONPATH", "VENV"} & environ.keys()
    assert environ["HOME"] == "/h"
    assert environ["NO_PROXY"] == "example.org,127.0.0.1,localhost"


def test_a_command_that_does_not_end_is_ended(tmp_path: Path) -> None:
    command = shell("echo slow; sleep 600", tmp_path, environment())
    with pytest.raises(Failed, match=r"(?s)did not end in 1 s.*slow"):
        command.wait(1)
    assert command.ended


def test_a_first_start_waits_for_an_answer_and_stops_the_server(tmp_path: Path) -> None:
    from tools import first_start

    port = free_port()
    (tmp_path / "Makefile").write_text("serve:\n\t@echo a broken server; exit 1\n")
    with pytest.raises(Failed, match="a broken server"):
        first_start.start(tmp_path, environment(), port)

    class Handler(BaseHTTPRequestHandler):
        left = 2

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            Handler.left -= 1
            self.send_response(503 if Handler.left >= 0 else 200)
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "The Nile"}}]}')

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        (tmp_path / "Makefile").write_text("serve:\n\t@sleep 60\n")
        assert 0 < first_start.start(tmp_path, environment(), port) < 30
        assert Handler.left < 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_every_make_target_of_the_documents_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for document in ("README.md", "docs/README-atlas.md", "DESIGN.md", "examples/README.md"):
        named = re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / document).read_text("utf-8"), re.MULTILINE)
        assert set(named) <= targets, document
    assert readme_check.LANGUAGES == ("sh", "python", "text")
