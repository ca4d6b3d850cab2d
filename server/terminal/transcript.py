"""What was said in a session at this terminal: a file of JSON lines that is only ever added to.

The session itself holds what the model has read, on the server; this is for people, and for taking turns back: a server
recognises a conversation whose end has changed when it is sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from server.terminal.arguments import CommandError

Role = Literal["user", "assistant"]


class Message(Struct, frozen=True, omit_defaults=True):
    """One message; `cut` where the answer was stopped."""

    role: Role
    content: str
    cut: bool = False

    def body(self) -> dict[str, str]:
        """As requests have it."""
        return {"role": self.role, "content": self.content}


class _Line(Struct, frozen=True, omit_defaults=True):
    """One line of the file: a turn, or something that was done to the turns before it."""

    turn: tuple[Message, Message] | None = None
    undo: bool = False
    rewind: bool = False
    restart: list[Message] | None = None
    joined: bool = False
    sent: bool = False


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode


@dataclass
class Transcript:
    """The turns of one session.

    Attributes:
      path: its file; None keeps none.
      messages: question and answer in turns.
      rewound: turns were taken back and the server has not been told.
      joined: the session had a text before the first turn that was said here.
    """

    path: Path | None = None
    messages: list[Message] = field(default_factory=list)
    rewound: bool = False
    joined: bool = False

    @classmethod
    def open(cls, path: Path | None) -> Transcript:
        """Reads what is there; a line that was cut off, or is damaged, is passed over. Raises CommandError."""
        made = cls(path)
        try:
            lines = b"" if path is None else path.read_bytes()
        except FileNotFoundError:
            return made
        except OSError as error:
            raise CommandError(f"what was said cannot be read from {path}: {error.strerror}") from None
        for line in lines.splitlines():
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                made._apply(_decode(line))
        return made

    def _apply(self, line: _Line) -> None:
        if line.restart is not None:
            self.messages, self.rewound, self.joined = list(line.restart), False, line.joined
        if line.undo:
            del self.messages[-2:]
        if line.undo or line.rewind:
            self.rewound = True
        if line.sent:
            self.rewound = False
        if line.turn is not None:
            self.messages += line.turn
            self.rewound = False

    def _add(self, line: _Line) -> None:
        self._apply(line)
        if self.path is None:
            return
        try:
            _append(self.path, _encode(line) + b"\n")
        except OSError as error:
            raise CommandError(f"what was said cannot be kept in {self.path}: {error.strerror}") from None

    def add(self, question: str, answer: str, *, cut: bool = False) -> None:
        """A turn that was answered."""
        self._add(_Line(turn=(Message("user", question), Message("assistant", answer, cut))))

    def undo(self) -> None:
        """Takes the last turn back."""
        self._add(_Line(undo=True))

    def rewind(self) -> None:
        """The server may hold something else than this: what is said next is sent with what came before it."""
        if not self.rewound:
            self._add(_Line(rewind=True))

    def told(self) -> None:
        """The server holds this, and no more."""
        if self.rewound:
            self._add(_Line(sent=True))

    def restart(self, messages: list[Message], *, joined: bool = False) -> None:
        """Begins again with these messages."""
        self._add(_Line(restart=messages, joined=joined))

    def tail(self, most: int) -> list[dict[str, str]]:
        """The last messages as requests have them, beginning with a question."""
        start = max(0, len(self.messages) - most)
        start += start % 2
        return [message.body() for message in self.messages[start:]]

    def copied(self, path: Path | None) -> Transcript:
        """The same turns in another file."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.path is not None and self.path.exists():
                shutil.copyfile(self.path, path)
                path.chmod(0o600)
                return Transcript.open(path)
        made = Transcript(path)
        if self.messages or self.joined:
            made.restart(list(self.messages), joined=self.joined)
        return made


def _append(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        file.write(b"\n" * _cut_off(path) + data)


def _cut_off(path: Path) -> bool:
    """Whether a file's last line is not whole."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def transcript_path(folder: Path, place: str, session: str) -> Path:
    """The file of a session's transcript: names of servers and sessions are not names of files."""
    digest = hashlib.sha256(f"{place}\n{session}".encode("utf-8", "surrogatepass")).hexdigest()
    return folder / "transcripts" / f"{digest[:32]}.jsonl"


def saved_state(transcript: Transcript, system: str | None, fields: dict[str, Any], most: int) -> dict[str, Any]:
    """What a save point keeps of a chat beside its memory: the last messages that fit into `most` bytes."""
    messages, size = [], 0
    for message in reversed(transcript.messages):
        size += len(message.content.encode()) + 64
        if size > most:
            break
        messages.append(message)
    messages.reverse()
    whole = len(messages) == len(transcript.messages)
    if messages and messages[0].role == "assistant":
        del messages[0]
    return {
        "chat": 1,
        "messages": msgspec.to_builtins(messages),
        "joined": transcript.joined or not whole,
        "system": system,
        "fields": fields,
    }


class Saved(Struct, frozen=True):
    """What `saved_state` kept."""

    chat: Literal[1]
    messages: list[Message]
    joined: bool = False
    system: str | None = None
    fields: dict[str, Any] = {}
