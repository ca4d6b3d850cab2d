"""`atlas-jax chat`: a conversation at the terminal, with a model in this process or a running server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.terminal.arguments import CommandError, Parser, run
from server.terminal.connection import add_flags, connected
from server.terminal.fields import assignments
from server.terminal.places import state_folder

if TYPE_CHECKING:
    from server.terminal.conversation import Conversation

PROG = "atlas-jax chat"


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog=PROG,
        description="Talks with a model that remembers: in sessions that grow past the attention window and survive a "
        "restart. /help inside lists what can be done with them. Where stdin or stdout is no terminal, one prompt is read "
        "and its answer written.",
    )
    made.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file, or folder of safetensors")
    add_flags(made)
    group = made.add_argument_group("the conversation")
    names = group.add_mutually_exclusive_group()
    names.add_argument(
        "-s", "--session", metavar="NAME", help="go on in this session, or begin it (default: a new one)"
    )
    names.add_argument("-c", "--continue", dest="go_on", action="store_true", help="go on in the session used last")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the requests, as /set has it; may repeat",
    )
    group.add_argument("--no-memory", action="store_true", help="plain attention, without sessions")
    group.add_argument(
        "--memory-path",
        type=Path,
        metavar="FOLDER",
        help="folder of the sessions of a model in this process (default: sessions in the user's state folder)",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return run(PROG, lambda: _run(parser().parse(argv)))


def _run(args: argparse.Namespace) -> int:
    from server.terminal.conversation import Conversation, new_session_name

    fields = assignments(args.set)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    prompt = "" if interactive else _piped()
    folder = state_folder()
    sessions = args.memory_path or folder / "sessions"
    asks_session = interactive or args.session is not None or args.go_on
    keeps = asks_session and not args.no_memory
    with connected(args, memory_path=sessions if keeps else None, memory=not args.no_memory) as client:
        place = args.url or os.fspath(sessions.absolute())
        talk = Conversation(client, folder=folder, place=place, fields=fields, memory=not args.no_memory)
        talk.system = args.system
        name = args.session
        if args.go_on:
            found = talk.sessions()
            if not found and not interactive:
                raise CommandError("there is no session to go on in")
            name = str(found[0]["context_id"]) if found else None
        if interactive:
            name = name or new_session_name()
        elif args.session is not None and talk.no_memory is not None:
            raise CommandError(f"there can be no session: {talk.no_memory}")
        known = talk.open(name)
        if not interactive:
            return _once(talk, prompt)
        _interactive(talk, known)
    return 0


def _interactive(talk: Conversation, known: bool) -> None:
    from server.terminal.line_input import LineInput
    from server.terminal.output import console, safe
    from server.terminal.repl import Repl

    out = console()
    out.print(f"{safe(talk.model, lines=False)} · /help lists the commands, Ctrl-D leaves", style="bold")
    repl = Repl(talk, out, lambda made: LineInput(state_folder() / "history", made.completions))
    repl.introduce(known)
    repl.run()


def _piped() -> str:
    from server.terminal.line_input import clean

    if sys.stdin.isatty():
        print("The prompt, up to Ctrl-D:", file=sys.stderr)
    text = clean(sys.stdin.buffer.read().decode("utf-8", "surrogateescape")).strip()
    if not text:
        raise CommandError("there is no prompt on stdin")
    return text


def _once(talk: Conversation, prompt: str) -> int:
    from server.terminal.output import safe

    shown = sys.stdout.isatty()
    for piece in talk.say(prompt):
        if piece.kind == "answer":
            sys.stdout.write(safe(piece.text) if shown else piece.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
