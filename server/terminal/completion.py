"""`atlas-jax completion SHELL`: a script by which a shell completes commands, flags, and the files they want."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from server.terminal.arguments import DONE, Parser, run
from server.terminal.commands import COMMANDS, SERVE

PROG = "atlas-jax completion"
_SHELLS = ("bash", "zsh", "fish")
_FILES = ("FILE", "FILE|FOLDER", "MODEL", "MODEL.gguf", "FILE.md")
_INSTALL = {
    "bash": "atlas-jax completion bash > ~/.local/share/bash-completion/completions/atlas-jax",
    "zsh": "atlas-jax completion zsh > ~/.zfunc/_atlas-jax   (a folder in fpath, before compinit)",
    "fish": "atlas-jax completion fish > ~/.config/fish/completions/atlas-jax.fish",
}


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog=PROG,
        description="Writes a script that completes commands, flags and files, to stdout.",
        epilog="\n".join(f"{shell}: {line}" for shell, line in _INSTALL.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("shell", choices=_SHELLS, metavar="SHELL", help="bash, zsh or fish")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return run(PROG, lambda: _run(parser().parse(argv)))


def _run(args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(whole(), shell=args.shell))
    return DONE


def whole() -> argparse.ArgumentParser:
    """One parser with every command, each with its flags."""
    import shtab

    from server.cli import serve_parser

    made = argparse.ArgumentParser(prog="atlas-jax", description="Models with a test-time memory.")
    made.add_argument("--version", action="store_true", help="print the version")
    commands = made.add_subparsers(dest="command")
    parsers: dict[str, tuple[str, argparse.ArgumentParser]] = {SERVE: ("serve a model", serve_parser())}
    parsers |= {name: (one.about, one.parser()) for name, one in COMMANDS.items()}
    for name, (about, own) in parsers.items():
        commands.add_parser(name, help=about, description=own.description, parents=[own], add_help=False)
    for action in _actions(made):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "FOLDER":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return made


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _actions(one)
