"""Runs every block of README.md as it is printed, in a bare clone, as somebody does who has just found the project.

    python -m tools.readme_check [--venv .venv] [--recall N] [--keep FOLDER]

What is done with a block follows from the block, so a new one is run without a word here:

- `sh`: its lines go to a shell in the clone. curl is told to fail where a server answers with an error. A command that
  says where its server is ready (`make serve`) goes on running, and is stopped with Ctrl-C after the last block that names
  its address.
- `python`: goes on in the interpreter of the block before if it uses names it does not define, else in a new one. Where a
  line ends in `# prints X`, the block's output must have X.
- `python` that defines `app`: is served by uvicorn, and asked for every path that its comments name.
- `text`: is not run. A block in another language, or in none, is an error.

`make test` is run as printed too, but told to list the tests and not to run them: CI runs them beside this, and one of them
would be this. With `--recall N` the blocks of the remembered conversation are run N times, each with a session of its own
name, and what counts is how often all of `# prints` was there: sampled answers lie between.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import re
import socket
import subprocess
import symtable
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tools.bare_clone import Command, Failed, clone, environment, fail, note, reuse, shell

LANGUAGES = ("sh", "python", "text")
PATIENCE = 600.0
_NEEDED = 0.9
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
_SESSION = re.compile(r'("session_id": ")(\w+)(")')
_CURLRC = "fail-with-body\nsilent\nshow-error\nmax-time = 120\n"
_INTERPRETER = """
import json, sys, io, contextlib, traceback
orders, names = sys.stdin, {"__name__": "__main__"}
answers, sys.stdout = sys.stdout, sys.stderr
for order in orders:
    name, code = json.loads(order)
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, name, "exec"), names)
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document; `line` is that of its first line of code."""

    language: str
    code: str
    line: int

    @property
    def name(self) -> str:
        first = self.code.strip().splitlines()[0] if self.code.strip() else ""
        return f"README.md:{self.line} ({self.language or 'no language'}) {first}"

    @property
    def prints(self) -> list[str]:
        """What its comments say is printed, in order."""
        return re.findall(r"#\s*prints (.+?)\s*$", self.code, re.MULTILINE)

    @property
    def free(self) -> set[str]:
        """Names its Python uses and does not define."""
        free: set[str] = set()
        defined: set[str] = set(dir(builtins))

        def visit(table: symtable.SymbolTable, *, top: bool) -> None:
            for symbol in table.get_symbols():
                if top and (symbol.is_assigned() or symbol.is_imported()):
                    defined.add(symbol.get_name())
                elif symbol.is_referenced() and (top or symbol.is_global()):
                    free.add(symbol.get_name())
            for child in table.get_children():
                visit(child, top=False)

        visit(symtable.symtable(self.code, "README.md", "exec"), top=True)
        return free - defined

    @property
    def is_application(self) -> bool:
        """Whether its Python makes an ASGI application."""
        return any(
            isinstance(target, ast.Name) and target.id == "app"
            for node in ast.parse(self.code).body
            if isinstance(node, ast.Assign)
            for target in node.targets
        )

    @property
    def paths(self) -> list[str]:
        """Paths its comments name."""
        return re.findall(r"(?<=[\s,])/[\w/]+", " ".join(re.findall(r"#(.*)$", self.code, re.MULTILINE)))


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order."""
    fences = (token for token in MarkdownIt().parse(text) if token.type == "fence")
    return [Block(token.info.strip(), token.content, token.map[0] + 2) for token in fences if token.map is not None]


def check_languages(found: list[Block]) -> None:
    """Every block says what it is.

    Raises:
      Failed: one does not.
    """
    unknown = [block.name for block in found if block.language not in LANGUAGES]
    if unknown:
        raise Failed("blocks must be one of " + ", ".join(LANGUAGES) + ":\n" + "\n".join(unknown))


def check_ports(found: list[Block]) -> None:
    """The ports that blocks ask on this machine are free, so that what answers is what the blocks have started.

    Raises:
      Failed: something listens there.
    """
    for port in sorted({int(port) for block in found for port in _ADDRESS.findall(block.code)}):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise Failed(
                    f"port {port} of 127.0.0.1 is in use ({error.strerror}), and README.md's server listens there: "
                    "stop what does now, and run this again"
                ) from None


class Interpreter:
    """A Python of the clone that is given blocks one after the other."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [folder / ".venv" / "bin" / "python", "-c", _INTERPRETER],
            cwd=folder,
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, block: Block) -> str:
        """What a block prints.

        Raises:
          Failed: it raises, or the interpreter has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([f"README.md:{block.line}", block.code]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise Failed(f"the interpreter ended with status {self._process.wait()}")
        printed, error = json.loads(answer)
        if error is not None:
            raise Failed(error)
        return str(printed)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Newcomer:
    """Runs blocks in a clone, in order.

    Args:
      folder: the clone.
      home: a folder of what the commands need beside it.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        (home / ".curlrc").write_text(_CURLRC)
        self._folder = folder
        self._environ = environment(CURL_HOME=str(home), PYTEST_ADDOPTS="--collect-only --quiet")
        self._servers: list[Command] = []
        self._interpreter: Interpreter | None = None

    def run(self, block: Block, later: list[Block]) -> str:
        """What a block prints; `later` are those that follow.

        Raises:
          Failed: it does not do what README.md says.
        """
        try:
            if block.language == "sh":
                output = self._shell(block)
            elif block.language == "python" and block.is_application:
                output = self._application(block)
            elif block.language == "python":
                output = self._python(block)
            else:
                output = ""
            self._end_servers(later)
        except Failed as error:
            logs = "".join(f"\n\nThe server {server.address} printed:\n{server.output}" for server in self._servers)
            raise Failed(f"{block.name}\n\n{block.code}\nas printed in README.md failed: {error}{logs}") from None
        return output

    def _shell(self, block: Block) -> str:
        command = shell(block.code, self._folder, self._environ).wait(PATIENCE)
        if command.address is not None:
            self._servers.append(command)
        return command.output

    def _python(self, block: Block) -> str:
        if self._interpreter is None or not block.free:
            self._close_interpreter()
            self._interpreter = Interpreter(self._folder, self._environ)
        return self._interpreter.run(block)

    def _application(self, block: Block) -> str:
        name = f"readme_{block.line}"
        (self._folder / f"{name}.py").write_text(block.code, "utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = [str(self._folder / ".venv" / "bin" / "python"), "-m", "uvicorn", f"{name}:app", "--port", str(port)]
        server = Command(argv, self._folder, self._environ)
        try:
            server.wait(PATIENCE)
            if not block.paths:
                raise Failed("no comment of an application names a path to ask")
            answers = [f"{path} {_get(f'{server.address}{path}')}" for path in block.paths]
            server.stop()
        finally:
            server.kill()
        return "\n".join(answers)

    def _end_servers(self, later: list[Block]) -> None:
        for server in list(self._servers):
            if not any(str(server.address) in block.code for block in later):
                self._servers.remove(server)
                self._close_interpreter()
                try:
                    server.stop()
                finally:
                    server.kill()

    def _close_interpreter(self) -> None:
        if self._interpreter is not None:
            self._interpreter.close()
            self._interpreter = None

    def close(self) -> None:
        """Ends what still runs."""
        self._close_interpreter()
        for server in self._servers:
            server.kill()


def _get(url: str) -> int:
    """The status of an answer to GET: 200, or 405 where only POST is answered."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=60) as answer:
            status: int = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    if status not in (200, 405):
        raise Failed(f"GET {url} is answered with {status}")
    return status


def missing(block: Block, output: str) -> list[str]:
    """What a block says it prints and does not."""
    return [text for text in block.prints if text not in output]


def check(newcomer: Newcomer, found: list[Block]) -> None:
    """Runs all blocks.

    Raises:
      Failed: one does not do what README.md says.
    """
    for number, block in enumerate(found):
        started = time.monotonic()
        output = newcomer.run(block, found[number + 1 :])
        lacks = missing(block, output)
        # sampled answers lie between: what is promised is nine of ten
        if lacks and not (_SESSION.search(block.code) and _repeat(newcomer, block, found[number:], 9) == 9):
            raise Failed(f"{block.name}\n\nshould print {', '.join(lacks)}; it printed:\n{output}")
        note(f"{time.monotonic() - started:6.1f} s  {block.name}")


def recall(newcomer: Newcomer, found: list[Block], times: int) -> int:
    """How often the remembered conversation prints what it says, of so many with sessions of different names.

    Raises:
      Failed: a block on the way does not work, or there is no such conversation.
    """
    asked = next((n for n, block in enumerate(found) if block.prints and _SESSION.search(block.code)), None)
    if asked is None:
        raise Failed("no block names a session and says what is printed")
    for number, before in enumerate(found[:asked]):
        newcomer.run(before, found[number + 1 :])
    return _repeat(newcomer, found[asked], found[asked:], times)


def _repeat(newcomer: Newcomer, block: Block, later: list[Block], times: int) -> int:
    """How often a block prints what it says, each time in a session of another name."""
    hits = 0
    for run in range(1, times + 1):
        code = _SESSION.sub(rf"\g<1>\g<2>-{run}\g<3>", block.code)
        output = newcomer.run(Block(block.language, code, block.line), later)
        hit = not missing(block, output)
        hits += hit
        note(f"{run:4d}  {'recalled' if hit else 'not recalled'}: {output.splitlines()[:1]}")
    return hits


def _folders(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="readme-") as work:
        yield Path(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="virtual environment whose packages are used, not installed again")
    parser.add_argument("--recall", type=int, metavar="N", help="run the remembered conversation so many times instead")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="clone into this new folder, and leave it there")
    args = parser.parse_args()
    try:
        for work in _folders(args.keep):
            folder = clone(work / "atlas-jax")
            found = blocks((folder / "README.md").read_text("utf-8"))
            check_languages(found)
            check_ports(found)
            if args.venv is not None:
                reuse(folder, args.venv)
            newcomer = Newcomer(folder, work)
            try:
                if args.recall is None:
                    check(newcomer, found)
                    note(f"All {len(found)} blocks of README.md work as printed.")
                    continue
                hits = recall(newcomer, found, args.recall)
                note(f"The remembered number was recalled in {hits} of {args.recall} conversations.")
                if hits < _NEEDED * args.recall:
                    raise Failed(f"fewer than {_NEEDED:.0%}")
            finally:
                newcomer.close()
    except Failed as error:
        fail(error)


if __name__ == "__main__":
    main()
