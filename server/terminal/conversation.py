"""A conversation with a model through the server's API: turns, and what is done to the session that remembers them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from server.errors import BadRequest
from server.services.memory_options import check_name
from server.terminal.arguments import CommandError
from server.terminal.client import ApiError, Client
from server.terminal.fields import RequestFields
from server.terminal.transcript import Message, Saved, Transcript, saved_state, transcript_path

_MEMORY = "/v1/atlas/memory"
_TAIL = 32
"""Messages that are sent again where the server has to find the place from which a conversation goes on."""
_SAVED_BYTES = 3 << 20
_PAGE = 1000


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer, or of what the model thinks before it."""

    text: str
    kind: Literal["answer", "thought"] = "answer"


@dataclass(frozen=True)
class Ending:
    """How an answer ended, as the server says.

    Attributes:
      reason: "stop" or "length"; "cut" where it was stopped here.
      stats: the `atlas_stats` of the answer; empty without a memory.
    """

    reason: str
    usage: Mapping[str, Any]
    timings: Mapping[str, Any]
    stats: Mapping[str, Any]


class Conversation:
    """One conversation at a time: in a session of the server where that has a memory, else in messages alone.

    Args:
      folder: where transcripts are; None keeps none.
      place: which server or folder of sessions the transcripts belong to.

    Attributes:
      session: its name; None without a memory.
      model: name of the model.
      no_memory: why there is no memory, or None.
      last: how the last answer ended.
    """

    def __init__(self, client: Client, *, folder: Path | None, place: str, fields: RequestFields, memory: bool) -> None:
        """Asks the server what it has; raises ApiError."""
        self.client, self.fields = client, fields
        self.system: str | None = None
        self.session: str | None = None
        self.last: Ending | None = None
        self.transcript = Transcript()
        self._folder, self._place = folder, place
        models = client.get("/v1/models").get("data") or [{}]
        self.model = str(models[0].get("id", "?"))
        self.no_memory = self._why_no_memory() if memory else "it was turned off"

    def _why_no_memory(self) -> str | None:
        try:
            status = self.client.get("/v1/atlas/status")
        except ApiError as error:
            if error.status in (404, 503):
                return str(error)
            raise
        unavailable = status.get("data", {}).get("memory_unavailable")
        return None if unavailable is None else str(unavailable)

    # --- turns ----------------------------------------------------------------------------------------------------
    def say(self, text: str) -> Iterator[Piece]:
        """Sends a message and yields the answer; what has come of one that is stopped is kept. Raises ApiError."""
        before: list[dict[str, str]] = []
        if self.session is None:
            before = self.transcript.tail(len(self.transcript.messages))
        elif self.transcript.rewound:
            if self.transcript.messages:
                before = self.transcript.tail(_TAIL)
            elif not self.transcript.joined:
                self._reset()
        return self._answer(text, before, again=False)

    def regenerate(self) -> Iterator[Piece]:
        """Answers the last message anew; raises CommandError where there is none, ApiError."""
        if not self.transcript.messages:
            raise CommandError("there is no answer here to give anew")
        *before, question, _ = self.transcript.tail(_TAIL if self.session else len(self.transcript.messages))
        return self._answer(question["content"], before, again=True)

    def _answer(self, question: str, before: list[dict[str, str]], *, again: bool) -> Iterator[Piece]:
        messages = [*before, {"role": "user", "content": question}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        atlas: dict[str, Any] | None = None
        if self.no_memory is None:
            atlas = self.fields.atlas()
            if self.session is not None:
                atlas |= {"session_id": self.session} | ({"regenerate": True} if again else {})
        body = {
            **self.fields.request(),
            "messages": messages,
            "stream_options": {"include_usage": True},
            **({} if atlas is None else {"atlas": atlas}),
        }
        said: list[str] = []
        state: dict[str, Any] = {}
        failed = done = False
        try:
            for event in self.client.stream("/v1/chat/completions", body):
                state |= {name: event[name] for name in ("usage", "timings", "atlas_stats") if event.get(name)}
                for choice in event.get("choices", ()):
                    state["reason"] = choice.get("finish_reason") or state.get("reason")
                    delta = choice.get("delta", {})
                    if thought := delta.get("reasoning_content"):
                        yield Piece(thought, "thought")
                    if text := delta.get("content"):
                        said.append(text)
                        yield Piece(text)
            done = True
        except ApiError:
            failed = True
            raise
        finally:
            self.last = Ending(
                (state.get("reason") or "stop") if done else "cut",
                state.get("usage", {}),
                state.get("timings", {}),
                state.get("atlas_stats", {}),
            )
            if done or (said and not failed):
                if again:
                    self.transcript.undo()
                self.transcript.add(question, "".join(said), cut=not done)
            elif said or not failed:  # the session may have read a part of it
                self.transcript.rewind()

    def undo(self) -> Message:
        """Takes the last turn back, and returns its question; raises CommandError where none is known here."""
        messages = self.transcript.messages
        if not messages:
            raise CommandError("there is nothing to take back: this session's turns were not said at this terminal")
        if len(messages) == 2 and self.transcript.joined:
            raise CommandError(
                "the first turn that was said here cannot be taken back: what came before it is not known"
            )
        question = messages[-2]
        self.transcript.undo()
        return question

    # --- sessions -------------------------------------------------------------------------------------------------
    def open(self, session: str | None) -> bool:
        """Goes on in a session; tells whether the server has it already. None is a conversation without one.

        Raises:
          CommandError: the name cannot be one; ApiError as well.
        """
        self.last = None
        if session is None or self.no_memory is not None:
            self.session, self.transcript = None, Transcript()
            return False
        known = self._exists(session)
        self.session = session
        self.transcript = Transcript.open(self._path(session))
        if known and not self.transcript.messages and not self.transcript.joined:
            self.transcript.restart([], joined=True)
        elif not known and self.transcript.messages:
            self.transcript.rewind()
        elif not known and self.transcript.joined:
            self.transcript.restart([])
        return known

    def _exists(self, session: str) -> bool:
        try:
            check_name(session, "session")
            self.client.get(_MEMORY, session_id=session)
        except BadRequest as error:
            raise CommandError(str(error)) from None
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def _path(self, session: str) -> Path | None:
        return None if self._folder is None else transcript_path(self._folder, f"{self._place}\n{self.model}", session)

    def _named(self) -> str:
        if self.session is None:
            raise CommandError(f"there is no session: {self.no_memory or 'this conversation has none'}")
        return self.session

    def _reset(self) -> None:
        with suppress(ApiError):  # one that is not there is empty
            self.client.post(f"{_MEMORY}/reset", {"session_id": self._named()})

    def clear(self) -> None:
        """Forgets the conversation; its session is empty then."""
        if self.session is not None:
            self._reset()
        self.transcript.restart([])
        self.last = None

    def branch(self, name: str) -> None:
        """Goes on in a new session that begins where this one is; this one stays as it is."""
        self.client.post(f"{_MEMORY}/fork", {"session_id": self._named(), "target": name})
        self.transcript = self.transcript.copied(self._path(name))
        self.session = name

    def save(self) -> int:
        """Makes a save point, with what was said; returns its bytes."""
        if self.transcript.rewound:
            raise CommandError("a turn was taken back: say something first, so that the session knows of it")
        state = saved_state(self.transcript, self.system, self.fields.values, _SAVED_BYTES)
        saved = self.client.post(f"{_MEMORY}/save", {"context_id": self._named(), "state": state})
        return int(saved.get("bytes", 0))

    def load(self, name: str | None = None) -> int:
        """Goes back to a session's save point, and what was said until then; returns how many messages those are."""
        session = name or self._named()
        found = self.client.post(f"{_MEMORY}/load", {"context_id": session})
        if session != self.session:
            self.open(session)
        try:
            saved = msgspec.convert(found.get("state"), Saved)
        except msgspec.ValidationError:  # another client's, or none
            self.transcript.restart([], joined=True)
            return 0
        self.transcript.restart(saved.messages, joined=saved.joined)
        self.system, self.fields = saved.system, RequestFields(saved.fields)
        return len(saved.messages)

    def sessions(self) -> list[dict[str, Any]]:
        """Every session of this owner, the latest first."""
        if self.no_memory is not None:
            raise CommandError(f"there are no sessions: {self.no_memory}")
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            page = self.client.post(f"{_MEMORY}/list", {"limit": _PAGE, "after": after})
            found += page.get("contexts", [])
            after = page.get("next")
            if after is None:
                return sorted(found, key=lambda row: -float(row.get("last_used", 0)))

    def memory(self) -> dict[str, Any] | None:
        """What the session's memory holds; None before its first turn."""
        try:
            return self.client.get(_MEMORY, session_id=self._named())
        except ApiError as error:
            if error.status == 404:
                return None
            raise


def new_session_name() -> str:
    """A name for a conversation that was given none."""
    return time.strftime("chat-%Y%m%d-%H%M%S")
