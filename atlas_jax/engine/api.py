"""What goes into the engine and what comes out: requests, events, and the facts an embedding program can ask for.

Plain frozen dataclasses and one msgspec struct, no JAX: the server, its tests and the engine meet here and nowhere else.
Values are validated where they enter (the server's schemas); the engine only re-checks what it would crash on. It is one long
file so that the whole seam between engine and server can be read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from atlas_jax.config import MAX_LOGIT_BIAS as MAX_LOGIT_BIAS  # part of the interface
from atlas_jax.engine.memory_options import CacheStrategy as CacheStrategy
from atlas_jax.engine.memory_options import MemoryOptions

FinishReason = Literal["stop", "length", "cancelled", "error"]
HistoryEffect = Literal["new", "continued", "appended", "rolled_back"]
"""What a prompt did to what its session holds; `engine.scheduler.resume` has the rules."""


# --- errors -----------------------------------------------------------------------------------------------------
class EngineError(Exception):
    """Base of every error the engine reports to a caller; `str(error)` is fit for a client to read."""


class InvalidRequest(EngineError):
    """A request that can never succeed.

    Attributes:
      param: the request field at fault, as a client wrote it (`"prompt"`, `"atlas.window_size"`), or None.
      code: short machine-readable reason, e.g. `"context_length_exceeded"`, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(EngineError):
    """No room now (queue full, contexts exhausted, draining); the same request may succeed later.

    Attributes:
      retry_after: seconds a client should wait.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class MemoryUnavailable(Overloaded):
    """No memory context is free, or a session's memory cannot be read now; the plain model would still answer."""


class SessionNotFound(EngineError):
    """No such session, context or snapshot for this owner."""


class SnapshotInvalid(EngineError):
    """A snapshot that is damaged, or was made by another model, tokenizer or memory shape."""


class StorageFull(EngineError):
    """The disk or the owner's quota has no room; nothing was changed.

    Attributes:
      retry_after: seconds after which it may be otherwise.
    """

    retry_after = 30.0


# --- requests ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn; the defaults sample from the model's own distribution.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 keeps every token.
      logit_bias: −100 bans a token and 100 forces it, whatever the temperature; at most `MAX_LOGIT_BIAS` entries.
      seed: None draws one; the seed that was used is in the result.
      logprobs: None for none, k ≥ 0 for the chosen token's log-probability and the k best alternatives.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Whose session: the owner comes from the API key, never from the request body."""

    owner: str
    session_id: str


class MemoryParams(MemoryOptions, kw_only=True, frozen=True):
    """How one request uses the ATLAS memory.

    Attributes:
      session: None gives the request a memory of its own that ends with it.
      asked: whether the model answers somebody, as in a chat, instead of going on with a text: what a person asks for is
        more often something said before than the next word of a text is, so the calibrated gate opens further.
      regenerate: a prompt the session has been asked before is answered anew: what followed it there is forgotten.
      given: fields the client wrote itself; a session keeps the window, update frequency, layers and degree it was
        begun with, and refuses a request that names others, but not one whose defaults differ.
    """

    session: SessionKey | None = None
    asked: bool = False
    regenerate: bool = False
    given: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFrame:
    """What the chat template put around the messages of a prompt, and what the messages are.

    Attributes:
      preamble: tokens before the first message that is not a system message; None if that place is not known.
      own: whether the template put them there by itself, and no words of the client's are in them.
      opening, closing: the tokens by which it begins and ends an answer.
      answers: whether there are answers among the messages: the client sends a conversation, not only what is new.
    """

    preamble: tuple[int, ...] | None = None
    own: bool = True
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    answers: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One sequence to continue. `n` choices are n requests with the same prompt and `choice` 0 … n−1.

    Attributes:
      prompt: token ids, at least one.
      max_tokens: None = until a stop, or the end of the context.
      stop: strings that end the text; the text before the match is delivered, the match is not.
      ignore_eos: never end at an end-of-generation token.
      prompt_logprobs: None, or k alternatives for every prompt token (`echo` with `logprobs`).
      choice: only choice 0 of a session's request goes on as that session; the others see it and leave no trace.
      owner: whose share of the engine this request uses (fairness, prefix reuse never crosses owners).
      reuse: take what another prompt of this owner that begins the same has left, and leave what this one reads.
      grammar: what the answer must match (`EngineProtocol.json_grammar`), or None.
      chat: what is known of a prompt that is a chat (`EngineProtocol.chat_frame`); a session then knows its parts.
      memory: None = the plain model.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    choice: int = 0
    owner: str = ""
    reuse: bool = True
    grammar: Any = None
    chat: ChatFrame | None = None
    memory: MemoryParams | None = None


# --- events -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token of the answer or, with `prompt_logprobs`, of the prompt.

    Attributes:
      data: the token's own bytes (a token may be part of a character).
      hidden: a control token of an answer, which is no part of its text.
      logprob: natural log under the distribution before temperature and filters; None for the first prompt token.
      top: alternatives (token, bytes, logprob), best first.
    """

    token: int
    data: bytes
    logprob: float | None = None
    top: tuple[tuple[int, bytes, float], ...] = ()
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt has been read; sent once, before any text, and only if `prompt_logprobs` was asked for."""

    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New text, complete characters only, with the tokens that produced it (none unless logprobs were asked for)."""

    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryStats:
    """What the memory did in this request; every figure is measured in it.

    Attributes:
      history: what the prompt did to what the session holds; "new" without a session.
      tokens_reused: tokens of the prompt that the session held already and that were not read again.
      tokens_absorbed: of the writes that were taken.
      writes_skipped: writes that were not taken because they diverged; `degraded` then says so.
    """

    memory_utilization: float
    window_fill_ratio: float
    omega_loss: float
    muon_iterations: int
    blend_ratio_actual: float
    tokens_absorbed: int
    session_id: str | None
    cache_hit: bool
    history: HistoryEffect = "new"
    tokens_reused: int = 0
    writes_skipped: int = 0
    degraded: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The last event of a request that was accepted and did not fail.

    Attributes:
      stop: the stop string that matched, or None.
      cached_tokens: prompt tokens that did not have to be processed again.
      queue_seconds, prompt_seconds, decode_seconds: where the time went.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seed: int
    stop: str | None = None
    queue_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    memory: MemoryStats | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that failed after it was accepted."""

    error: EngineError


Event = Prompt | Delta | Finished | Failed
Listener = Callable[[Event], None]


class Handle(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """Ends the request at the next step and frees what it held; safe from any thread, any number of times."""


# --- what an embedding program can ask ------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """The model being served.

    Attributes:
      name: file name without `.gguf`; the id clients use.
      fingerprint: identifies weights and tokenizer; snapshots are bound to it.
      context_length: the model's trained context in tokens.
      created: Unix seconds (the file's time).
      memory_dim: numbers of a state that the recall memory's keys keep; None without such a memory.
      memory_unavailable: why the model is served without a memory although one was asked for, or None.
      sampling: what the file recommends, by the names of `SamplingParams`; empty where it says nothing.
    """

    name: str
    architecture: str
    fingerprint: str
    parameters: int
    size_bytes: int
    context_length: int
    vocab_size: int
    layers: int
    embedding_size: int
    memory_layers: tuple[int, ...]
    state_bytes_per_session: int
    adapter: str | None
    created: int
    memory_dim: int | None = None
    memory_unavailable: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMemoryInfo:
    """One matrix of one session's memory (or means over the sessions asked for).

    Attributes:
      layer: the transformer layer it belongs to, the best-ranked of its taps.
      taps: every layer whose state its keys are made of.
    """

    layer: int
    taps: tuple[int, ...]
    norm: float
    effective_rank: float
    omega_loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryInfo:
    """State of one session's memory, or totals over an owner's sessions.

    Attributes:
      window_size, window_fill: tokens of the exact window, and how many of it are held; never more.
      memory_capacity, memory_used: independent pairs the memory can hold, and how many directions are in use.
      last_update_time: Unix seconds, or None before the first write.
    """

    window_size: int
    window_fill: int
    memory_capacity: int
    memory_used: int
    total_updates: int
    last_update_time: float | None
    layers: tuple[LayerMemoryInfo, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """One row of a session listing."""

    session_id: str
    tokens: int
    bytes: int
    created: float
    last_used: float
    resident: Literal["device", "host", "disk"]
    has_state: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """A stored session or file that cannot be used; it is kept as it is.

    Attributes:
      name: of the session or file; where damage has made a session's name unreadable, a digest of it.
    """

    name: str
    kind: Literal["session", "file"]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One row of a listing of exports; `modified` in Unix seconds."""

    filename: str
    bytes: int
    modified: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveResult:
    """What a save wrote."""

    filename: str
    session_id: str | None
    bytes: int
    sessions: int
    timestamp: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counters since start, and gauges of this moment.

    Attributes:
      omega_loss_total: of every write that was taken.
      omega_loss, memory_utilization, window_fill_ratio: of the request with a memory that ended last.
    """

    requests_total: int
    requests_running: int
    requests_waiting: int
    requests_completed: int
    requests_failed: int
    requests_cancelled: int
    prompt_tokens_total: int
    cached_tokens_total: int
    generated_tokens_total: int
    drafted_tokens_total: int
    accepted_tokens_total: int
    tokens_per_second: float
    steps_total: int
    step_seconds_total: float
    compilations_total: int
    sessions_device: int
    sessions_host: int
    sessions_disk: int
    session_hits: int
    session_misses: int
    memory_updates_total: int
    muon_iterations_total: int
    writes_skipped_total: int
    omega_loss_total: float
    omega_loss: float
    memory_utilization: float
    window_fill_ratio: float
    memory_saves: int
    memory_loads: int
    snapshot_failures: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotInfo:
    """One decode slot, as `GET /slots` shows it (no text); `owner` is whose request it runs, None in a free one."""

    id: int
    busy: bool
    owner: str | None
    prompt_tokens: int
    generated_tokens: int
    session: bool


class SessionStore(Protocol):
    """The memory endpoints' view of the sessions. Methods are thread-safe and block; owners never see each other."""

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
        """The caller's JSON as saved (None if only neural memory was), with the session set back to its save point."""

    def reset(self, owner: str, session_id: str | None) -> int:
        """Empties one session's memory, or all of the owner's; returns how many."""

    def delete(self, owner: str, session_id: str) -> None:
        """Removes a session and its files; raises SessionNotFound."""

    def delete_file(self, owner: str, filename: str) -> None:
        """Removes a file of sessions; raises SessionNotFound."""

    def expire(self, idle: float) -> int:
        """Deletes every session that nobody has used for `idle` seconds; returns how many."""


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

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; control tokens come from the template alone, never from message text."""

    def chat_frame(
        self, messages: Sequence[Mapping[str, Any]], *, variables: Mapping[str, Any] | None = None
    ) -> ChatFrame:
        """What the template puts around these messages, for requests that go on with a session."""

    def apply_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The same as text, for people to read."""

    def json_grammar(self, schema: Mapping[str, Any], *, owner: str = "") -> Future[Any]:
        """A grammar of the JSON texts a schema allows, for requests to this engine.

        The future fails with InvalidRequest or Overloaded; cancelling it ends the work. The result has an attribute
        `ignored`, the names of the keywords that are not enforced.

        Args:
          owner: whose share of the compiling it uses; nothing of it is shared with other owners.

        Raises:
          InvalidRequest: the schema is larger than any may be, or the model cannot end an answer.
          Overloaded: the engine is closed.
        """

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
