"""What a server needs of an engine, its tokenizer and its sessions; `Engine` implements it, tests may bring a simpler one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from atlas_jax.engine.api.events import Listener
from atlas_jax.engine.api.info import (
    EngineStats,
    Fitting,
    LoraInfo,
    MemoryInfo,
    ModelInfo,
    SaveResult,
    SessionInfo,
    SetAside,
    SlotInfo,
    StoredFile,
    TemplateFacts,
)
from atlas_jax.engine.api.requests import ChatFrame, GenerationRequest, MemoryParams
from atlas_jax.grammar.calls import CallGrammar
from atlas_jax.grammar.shape import AnswerShape


class Handle(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """Ends the request at the next step and frees what it held; safe from any thread, any number of times."""


class SessionStore(Protocol):
    """The memory endpoints' view of the sessions. Methods are thread-safe and block; owners never see each other.

    What changes a session raises SessionConflict where another server with the same store has changed it meanwhile.
    """

    def info(self, owner: str, session_id: str | None) -> MemoryInfo:
        """Memory state of one session, or totals over the owner's; raises SessionNotFound."""

    def list(self, owner: str, *, after: str | None, limit: int) -> tuple[tuple[SessionInfo, ...], str | None]:
        """One page of the owner's sessions by id, and the cursor of the next page."""

    def files(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's files of sessions, by name."""

    def set_aside(self, owner: str) -> tuple[SetAside, ...]:
        """The owner's sessions and files that cannot be used, with the reason."""

    def save_changed(self, *, timeout: float | None = None) -> int:
        """Writes a snapshot of every session that has gone on since its last, whoever owns it; returns how many are left."""

    def save_all(self, owner: str, filename: str | None) -> SaveResult:
        """Writes every session of the owner into one file of the memory folder (default `<model>_memory.atlas`)."""

    def save_default(self, owner: str, *, timeout: float | None = None) -> SaveResult | None:
        """The same into the default file, unless it would take too long, or has just taken long; then None."""

    def save_session(self, owner: str, session_id: str) -> SaveResult:
        """Makes a save point of one session, which stays as it is until the next."""

    def save_context(self, owner: str, context_id: str, state: Any) -> SaveResult:
        """Stores the caller's JSON with the session of that name and makes a save point of both."""

    def load_file(self, owner: str, filename: str) -> int:
        """Replaces the owner's sessions named in the file; returns how many were loaded."""

    def load_default(self, owner: str) -> int | None:
        """Brings in what the default file has that is newer than what is stored; None where there is no file."""

    def load_context(self, owner: str, context_id: str) -> Any:
        """The caller's JSON as saved (None if only neural memory was), with the session rolled back to its save point."""

    def fork(self, owner: str, source: str, target: str) -> bool:
        """Begins a session that goes on from another's last turn, and leaves that one alone; False where it is not there."""

    def rename(self, owner: str, source: str, target: str) -> None:
        """Gives a session, its save point and the caller's JSON another name; it never has both names or neither.

        Raises:
          SessionNotFound: there is no `source`.
          SessionExists: there is a `target`.
        """

    def reset(self, owner: str, session_id: str | None) -> int:
        """Empties one session's memory, or all of the owner's; returns how many."""

    def delete(self, owner: str, session_id: str) -> None:
        """Removes a session and its files; raises SessionNotFound."""

    def delete_file(self, owner: str, filename: str) -> None:
        """Removes a file of sessions; raises SessionNotFound."""

    def expire(self, idle: float) -> int:
        """Deletes every session that nobody has used for `idle` seconds; returns how many."""


class DocumentStore(Protocol):
    """Small texts that are kept for owners, as durably as their sessions; methods are thread-safe and block."""

    @property
    def shared(self) -> bool:
        """Whether other servers write and delete documents too: what was listed may be old."""

    def list(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's documents, by name."""

    def read(self, owner: str, name: str) -> bytes | None:
        """A document, None where there is none; raises SnapshotInvalid where it is damaged."""

    def write(self, owner: str, name: str, data: bytes) -> None:
        """Replaces a document, whole or not at all; raises StorageFull."""

    def delete(self, owner: str, name: str) -> None:
        """Removes a document; one that is not there is no error."""


class Tokenizer(Protocol):
    """The part of the model's tokenizer a server needs."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text.

        Args:
          add_special: put the model's own first and last tokens around it.
          parse_special: read names of control tokens as those tokens; text of strangers must be read without.
        """

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids; bytes that are no character become U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, which may be part of a character."""


class EngineProtocol(Protocol):
    """What a server needs of an engine; `Engine` implements it, tests may bring a simpler one."""

    @property
    def model(self) -> ModelInfo:
        """Facts of the model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""

    @property
    def sessions(self) -> SessionStore:
        """The sessions; raises MemoryUnavailable in an engine without memory."""

    @property
    def documents(self) -> DocumentStore:
        """What a server keeps for owners; in memory only where sessions are not kept on disk."""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; control tokens come from the template alone, never from message text."""

    @property
    def template(self) -> TemplateFacts:
        """What its chat template can do."""

    def chat_frame(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatFrame:
        """What the template puts around these messages, for requests that go on with a session."""

    def apply_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The same as text, for people to read."""

    def answer_grammar(self, shape: AnswerShape, *, owner: str = "") -> Future[Any]:
        """A grammar of the answers that a schema, an expression or a grammar allows, for requests to this engine.

        The future fails with InvalidRequest or Overloaded; cancelling it ends the work. The result has an attribute
        `ignored`, the names of the keywords that are not enforced.

        Args:
          owner: whose share of the compiling it uses; nothing of it is shared with other owners.

        Raises:
          InvalidRequest: the shape is larger than any may be, or the model cannot end an answer.
          Overloaded: the engine is closed.
        """

    def call_grammar(self, calls: CallGrammar, *, owner: str = "") -> Future[Any]:
        """A grammar of answers with tool calls; otherwise as `answer_grammar`."""

    def check_memory(self, memory: MemoryParams) -> None:
        """Raises InvalidRequest for settings of the memory that every request with them would be refused for."""

    @property
    def lora(self) -> tuple[LoraInfo, ...]:
        """The LoRA adapters, with the scales of requests that say nothing of them."""

    def scale_lora(self, scales: Sequence[float]) -> None:
        """Changes these scales, one for each adapter; requests that have come, and sessions, keep theirs.

        Raises:
          InvalidRequest: there are too few or too many, or one is out of range.
        """

    def fitting(self) -> Fitting | None:
        """How far a memory is that is being fitted to the model, which is served without until then; else None."""

    def before_memory(self, prepare: Callable[[SessionStore], None]) -> None:
        """Has `prepare` called with the sessions once a memory has been fitted, on a thread, before any request has it."""

    def submit(self, request: GenerationRequest, listener: Listener) -> Handle:
        """Queues a request; `listener` is called from the engine's thread and must not block.

        Raises:
          InvalidRequest: it can never succeed.
          Overloaded: the queue is full, or the engine is draining.
          MemoryUnavailable: the request asked for a memory that cannot be had now; nothing was queued.
        """

    def stats(self) -> EngineStats:
        """Counters since start, and gauges of this moment."""

    def slots(self) -> tuple[SlotInfo, ...]:
        """What each decode slot is doing."""

    def alive(self) -> bool:
        """False once the engine thread has died; the process should then end and be restarted."""

    def drain(self) -> None:
        """Refuses new requests from now on; running ones go on."""

    def close(self, *, timeout: float) -> None:
        """Ends what still runs and brings every answered turn to the disk; idempotent."""
