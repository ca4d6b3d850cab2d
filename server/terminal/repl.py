"""The interactive chat: messages, answers as they come, and commands that begin with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from server.config.sources import suggestion
from server.terminal.arguments import CommandError, UsageError
from server.terminal.conversation import Conversation, Piece, new_session_name
from server.terminal.fields import RequestFields
from server.terminal.line_input import LineInput
from server.terminal.output import age, facts, number, safe, size, table

_SHOWN = 20
_LEAVE = "Ctrl-D or /exit leaves."


@dataclass(frozen=True)
class _Command:
    run: Callable[[str], None]
    arguments: str
    about: str


class _Exit(Exception):
    pass


class Repl:
    """A chat at a terminal."""

    def __init__(self, conversation: Conversation, out: Console, lines: Callable[[Repl], LineInput]) -> None:
        self._talk, self._out = conversation, out
        self._commands = {
            "help": _Command(self._help, "", "this list"),
            "session": _Command(
                self._session, "[NAME]", "go on in another session, or begin it; without a name a new one"
            ),
            "sessions": _Command(self._sessions, "[TEXT]", "list the sessions, or those whose names have TEXT in them"),
            "save": _Command(self._save, "", "make a save point of this session and of what was said"),
            "load": _Command(self._load, "[NAME]", "go back to a session's save point"),
            "branch": _Command(self._branch, "NAME", "go on in a copy of this session, and leave this one as it is"),
            "stats": _Command(self._stats, "", "window, kept pairs, memory, speed of the last answer"),
            "set": _Command(
                self._set, "[NAME VALUE]", "set a field of the requests; null takes it back; alone shows all"
            ),
            "system": _Command(self._system, "[TEXT]", "set the system message; - removes it; alone shows it"),
            "undo": _Command(self._undo, "", "take the last turn back"),
            "regenerate": _Command(self._regenerate, "", "answer the last message anew"),
            "clear": _Command(self._clear, "", "forget this conversation"),
            "exit": _Command(self._exit, "", "leave; the session stays"),
        }
        self._lines = lines(self)

    def completions(self, text: str) -> Sequence[str]:
        """What a line may go on to: commands, and the fields of /set."""
        if not text.startswith("/"):
            return []
        if text.startswith("/set "):
            return [f"/set {name} " for name in RequestFields.names() if name.startswith(text.removeprefix("/set "))]
        return [f"/{name}" for name in self._commands if name.startswith(text[1:])]

    def run(self) -> None:
        """Until the user leaves."""
        while True:
            try:
                text = self._lines.read()
            except KeyboardInterrupt:
                self._out.print(f"\n{_LEAVE}", style="dim")
                continue
            if text is None:
                self._out.print()
                return
            if not text:
                continue
            try:
                self._take(text)
            except _Exit:
                return
            except KeyboardInterrupt:
                self._out.print()
            except (CommandError, UsageError) as error:
                self._out.print(Text(safe(str(error)), style="red"))

    def _take(self, text: str) -> None:
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            command = self._commands.get(name)
            if command is None:
                near = suggestion(f"/{name}", [f"/{one}" for one in self._commands])
                raise UsageError(
                    f"there is no command /{name}{near or '; /help lists them'} (// sends a line that begins with /)"
                )
            command.run(rest.strip())
            return
        self.answer(self._talk.say(text))

    def answer(self, pieces: Iterator[Piece]) -> None:
        """Writes an answer as it comes; Ctrl-C stops it and nothing else."""
        write, stopped, kind = self._out.print, False, None
        with closing(pieces):  # type: ignore[type-var]
            try:
                for piece in pieces:
                    if kind == "thought" and piece.kind == "answer":
                        write("\n")
                    kind = piece.kind
                    write(
                        Text(safe(piece.text), style="dim italic" if kind == "thought" else ""), end="", soft_wrap=True
                    )
            except KeyboardInterrupt:
                stopped = True
        write(" (stopped)" if stopped else "", style="dim")
        self._foot()

    def _foot(self) -> None:
        last = self._talk.last
        if last is None or last.reason == "cut":
            return
        parts = []
        if last.timings:
            parts += [f"{last.timings['predicted_n']} tokens", f"{last.timings['predicted_per_second']:.0f} tok/s"]
        if last.reason == "length":
            parts.append("cut off at max_tokens")
        if last.stats.get("degraded"):
            parts.append(str(last.stats["degraded"]))
        if last.stats.get("tokens_absorbed"):
            parts.append(f"{number(last.stats['tokens_absorbed'])} tokens written to the memory")
        if parts:
            self._out.print(Text(safe(" · ".join(parts)), style="dim"))

    # --- commands -------------------------------------------------------------------------------------------------
    def _help(self, _: str) -> None:
        rows = ((f"/{name} {one.arguments}".rstrip(), one.about) for name, one in self._commands.items())
        self._out.print(facts(rows))
        self._out.print(
            'A line that ends in \\ goes on in the next; """ begins and ends a message of several lines; Alt-Enter and '
            f"pasting work too. Ctrl-C stops an answer. {_LEAVE}",
            style="dim",
        )

    def _session(self, name: str) -> None:
        name = name or new_session_name()
        self.introduce(self._talk.open(name))

    def introduce(self, known: bool) -> None:
        """Says which session it is, and what is known of it."""
        talk = self._talk
        if talk.session is None:
            self._out.print(
                Text(safe(f"No session: {talk.no_memory}. What is said is sent whole each time."), style="dim")
            )
            return
        turns = len(talk.transcript.messages) // 2
        if known:
            memory = talk.memory() or {}
            held = f"window {memory.get('window_fill', 0)}/{memory.get('window_size', 0)}"
            held += f", {turns} turns said here" if turns else ""
            text = f"Session {talk.session} goes on ({held})."
        elif turns:
            text = f"The server has no session {talk.session} any more; its last messages are sent again."
        else:
            text = f"Session {talk.session} is new."
        self._out.print(Text(safe(text, lines=False), style="dim"))
        if turns:
            for message in talk.transcript.messages[-2:]:
                mark = ">>> " if message.role == "user" else ""
                self._out.print(Text(safe(_short(mark + message.content)), style="dim"), soft_wrap=True)

    def _sessions(self, part: str) -> None:
        found = [row for row in self._talk.sessions() if part.casefold() in str(row["context_id"]).casefold()]
        if not found:
            self._out.print("There are no sessions." if not part else "No session's name has that in it.")
            return
        rows = (
            (
                "*" if row["context_id"] == self._talk.session else "",
                str(row["context_id"]),
                number(row["tokens"]),
                size(row["bytes"]),
                age(row["last_used"]),
                str(row["resident"]),
            )
            for row in found[:_SHOWN]
        )
        columns = (
            ("", False),
            ("session", False),
            ("tokens", True),
            ("bytes", True),
            ("used", True),
            ("rests on", False),
        )
        self._out.print(table(columns, rows))
        if len(found) > _SHOWN:
            self._out.print(f"… and {number(len(found) - _SHOWN)} more; /sessions TEXT narrows them", style="dim")

    def _save(self, _: str) -> None:
        self._out.print(f"Saved: {size(self._talk.save())}. /load goes back to this point.", style="dim")

    def _load(self, name: str) -> None:
        count = self._talk.load(name or None)
        self._out.print(f"Back at the save point: {count // 2} turns are known here.", style="dim")

    def _branch(self, name: str) -> None:
        if not name:
            raise UsageError("/branch wants a name for the new session")
        before = self._talk.session
        self._talk.branch(name)
        self._out.print(
            Text(safe(f"Session {name} goes on from here; {before} stays as it is.", lines=False), style="dim")
        )

    def _stats(self, _: str) -> None:
        talk = self._talk
        rows: list[tuple[str, str]] = [("model", talk.model), ("server", talk.client.place)]
        if talk.session is not None:
            rows.append(("session", talk.session))
            memory = talk.memory()
            rows += [("state", "nothing has been said yet")] if memory is None else _memory_rows(memory)
        else:
            rows.append(("memory", f"none: {talk.no_memory}"))
        if talk.last is not None:
            rows += _last_rows(talk.last.usage, talk.last.timings, talk.last.stats)
        self._out.print(facts(rows))

    def _set(self, text: str) -> None:
        fields = self._talk.fields
        if not text:
            rows = [(name, json.dumps(value, ensure_ascii=False)) for name, value in fields]
            self._out.print(facts(rows) if rows else "Nothing is set; the server's defaults hold.")
            self._out.print(f"Fields: {', '.join(fields.names())}", style="dim")
            return
        name, _, value = (
            text.replace("=", " ", 1).partition(" ") if "=" in text.partition(" ")[0] else text.partition(" ")
        )
        if not value.strip():
            raise UsageError(f"/set {name} wants a value; null takes it back")
        whole = fields.set(name, value.strip())
        shown = fields.values.get(whole)
        self._out.print(
            f"{whole} is the server's default" if shown is None else f"{whole} = {json.dumps(shown)}", style="dim"
        )

    def _system(self, text: str) -> None:
        if text:
            self._talk.system = None if text == "-" else text
        shown = self._talk.system
        self._out.print(Text("No system message." if shown is None else safe(shown), style="dim"))

    def _undo(self, _: str) -> None:
        question = self._talk.undo()
        self._out.print(Text(safe(f"Taken back: {_short(question.content)}"), style="dim"), soft_wrap=True)

    def _regenerate(self, _: str) -> None:
        self.answer(self._talk.regenerate())

    def _clear(self, _: str) -> None:
        self._talk.clear()
        self._out.print("The conversation is forgotten.", style="dim")

    def _exit(self, _: str) -> None:
        raise _Exit


def _memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    capacity = memory["memory_capacity"]
    share = memory["memory_used"] / capacity if capacity else 0.0
    updated = memory["last_update_time"]
    return [
        ("window", f"{memory['window_fill']} of {memory['window_size']} tokens, {size(memory['window_bytes'])}"),
        (
            "kept pairs",
            f"{memory['kept_pairs']} of {memory['kept_pairs_capacity']} a layer and head, {size(memory['kept_bytes'])}",
        ),
        (
            "Omega memory",
            f"{share:.1%} of {number(capacity)} directions in use, {number(memory['total_updates'])} writes"
            f"{'' if updated is None else f', the last {age(updated)} ago'}, {size(memory['memory_bytes'])}",
        ),
        ("when full", f"{size(memory['state_bytes'])} of {size(memory['memory_budget_bytes'])}"),
    ]


def _last_rows(usage: Mapping[str, Any], timings: Mapping[str, Any], stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if usage:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        rows.append(
            ("last prompt", f"{number(usage['prompt_tokens'])} tokens, {number(cached)} of them not read again")
        )
    if timings:
        rows.append(
            (
                "last answer",
                f"{timings['predicted_n']} tokens at {timings['predicted_per_second']:.0f} tok/s, after "
                f"{timings['prompt_ms']:.0f} ms for the prompt ({timings['prompt_per_second']:.0f} tok/s)",
            )
        )
    if stats:
        rows.append(
            (
                "its memory",
                f"history {stats['history']}, {number(stats['tokens_absorbed'])} tokens written, "
                f"gate {stats['blend_ratio_actual']:.3f}, omega loss {stats['omega_loss']:.3g}",
            )
        )
        if stats.get("degraded"):
            rows.append(("degraded", str(stats["degraded"])))
    return rows


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
