"""`atlas-jax generate`: one completion, or one answer, to stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from server.terminal.arguments import DONE, CommandError, Parser, UsageError, run
from server.terminal.connection import add_flags, connected
from server.terminal.fields import assignments

if TYPE_CHECKING:
    from server.terminal.client import Client

PROG = "atlas-jax generate"
_SCHEMA_BYTES = 1 << 20


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog=PROG,
        usage=f"{PROG} [flags] MODEL PROMPT\n       {PROG} [flags] (--url URL | -hf ORG/NAME) PROMPT",
        description="Writes what a model makes of a prompt to stdout, as it comes. The exit code is 0 where the answer "
        "ended, or had as many tokens as it might; 1 where there is none, or --schema's answer was cut off; 2 for a wrong "
        "command line; 130 after Ctrl-C.",
    )
    made.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file, or folder of safetensors")
    made.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads it from stdin")
    add_flags(made)
    group = made.add_argument_group("the answer")
    group.add_argument("--chat", action="store_true", help="the prompt is a message, and the answer the assistant's")
    group.add_argument("--system", metavar="TEXT", help="the system message; needs --chat")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens (default: 128, with --chat until it ends)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument("--temperature", metavar="X", help="0 is greedy")
    group.add_argument(
        "--schema", type=Path, metavar="FILE", help="JSON schema that the answer follows; makes it a chat"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another field of the request; may repeat"
    )
    group.add_argument("--json", action="store_true", help="write the whole response as JSON, when it is there")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return run(PROG, lambda: _run(parser().parse(argv)))


def _run(args: argparse.Namespace) -> int:
    schema = None if args.schema is None else _schema(args.schema)
    if args.system is not None and not (args.chat or schema is not None):
        raise UsageError("--system needs --chat: a plain completion has no messages")
    body = _body(args, schema)
    prompt = _stdin() if args.prompt == "-" else args.prompt
    if args.chat or schema is not None:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
        if args.system is not None:
            body["messages"].insert(0, {"role": "system", "content": args.system})
    else:
        path, body["prompt"] = "/v1/completions", prompt
    uses_memory = "atlas" in body
    with connected(args, memory=uses_memory) as client:
        reason = _whole(client, path, body) if args.json else _streamed(client, path, body)
    if schema is not None and reason == "length":
        raise CommandError("the answer was cut off before it was whole: give it more with --max-tokens")
    return DONE


def _body(args: argparse.Namespace, schema: Any) -> dict[str, Any]:
    fields = assignments(args.set)
    for name, value in (("max_tokens", args.max_tokens), ("seed", args.seed), ("temperature", args.temperature)):
        if value is not None:
            fields.set(name, str(value))
    body = fields.request()
    if fields.atlas():
        body["atlas"] = fields.atlas()
    if schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    elif not args.chat:
        body.setdefault("max_tokens", 128)
    return body


def _schema(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            raw = file.read(_SCHEMA_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--schema {path}: {error.strerror}") from None
    if len(raw) > _SCHEMA_BYTES:
        raise UsageError(f"--schema {path}: larger than 1 MiB")
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--schema {path}: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"--schema {path}: a JSON object is needed")
    return found


def _stdin() -> str:
    data = sys.stdin.buffer.read()
    text = data.decode("utf-8", "replace")
    if not text:
        raise CommandError("there is no prompt on stdin")
    return text


def _whole(client: Client, path: str, body: dict[str, Any]) -> str:
    answer = client.post(path, body)
    print(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())
    return str(answer["choices"][0]["finish_reason"])


def _streamed(client: Client, path: str, body: dict[str, Any]) -> str:
    from server.terminal.output import safe

    shown, reason, last = sys.stdout.isatty(), "", "\n"
    for text, why in _texts(client, path, body):
        sys.stdout.write(safe(text) if shown else text)
        sys.stdout.flush()
        reason, last = why or reason, text or last
    if not last.endswith("\n"):
        sys.stdout.write("\n")
    return reason


def _texts(client: Client, path: str, body: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    for event in client.stream(path, body):
        for choice in event.get("choices", ()):
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            yield text, choice.get("finish_reason")
