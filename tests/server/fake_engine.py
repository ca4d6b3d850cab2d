"""An engine whose answers can be worked out by hand: it repeats the prompt, or says what its `script` has next.

Tokens are bytes (0–255) and four special ones. The answer is the prompt's text from its beginning, byte by byte, and
ends with the prompt; a seed above temperature 0 starts it `seed` bytes later. Every log-probability is −0.5, the
alternatives follow at −1.5, −2.5, … with the next byte values.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.engine.api import (
    AnswerShape,
    CallGrammar,
    ChatFrame,
    Delta,
    Embedded,
    EngineError,
    EngineStats,
    Failed,
    Finished,
    Fitting,
    GenerationRequest,
    InvalidRequest,
    Listener,
    LoraInfo,
    MemoryParams,
    MemoryStats,
    ModelInfo,
    Overloaded,
    Prompt,
    SlotInfo,
    StateBytes,
    TemplateFacts,
    TokenInfo,
)
from tests.server.fake_sessions import FakeDocuments, FakeSessions, Session

BOS, EOS, START, END = 256, 257, 258, 259
SPECIAL = {"<s>": BOS, "</s>": EOS, "<|im_start|>": START, "<|im_end|>": END}
NAMES = {token: text for text, token in SPECIAL.items()}
MARKERS = re.compile("(" + "|".join(re.escape(name) for name in SPECIAL) + ")")
CONTEXT = 4096
RUNAWAY = 100_000
KEPT = 768
STATE = StateBytes(window=500, kept=400, memory=124, budget=1 << 24)


@dataclass(frozen=True)
class FakeGrammar:
    schema: AnswerShape | CallGrammar
    owner: str
    ignored: tuple[str, ...] = ()


class ByteTokenizer:
    vocab_size = 260

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        out: list[int] = []
        for piece in MARKERS.split(text) if parse_special else [text]:
            out += [SPECIAL[piece]] if parse_special and piece in SPECIAL else list(piece.encode())
        return out

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return b"".join(b"" if skip_special and one >= BOS else self.token_bytes(one) for one in ids).decode(
            errors="replace"
        )

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < BOS else NAMES[token].encode()


class Running:
    """One request on its way."""

    def __init__(self, engine: FakeEngine, request: GenerationRequest, listener: Listener) -> None:
        self.engine, self.request, self.listener = engine, request, listener
        self.cancelled = False
        self.buffer = b""
        self.text = ""
        self.sent = 0
        self.held: list[TokenInfo] = []
        self.seed = request.sampling.seed if request.sampling.seed is not None else 0
        text = [token for token in request.prompt if token < BOS] or [ord("x")]
        shift = self.seed % len(text) if request.sampling.temperature > 0 else 0
        self.source = text[shift:] + text[:shift]
        self.scripted = bool(engine.script)
        if self.scripted:
            self.source = list(engine.script.pop(0).encode())
        self.cached = 0
        self.session: Session | None = None
        memory = request.memory
        if memory is not None and memory.session is not None:
            session = self.session = engine.sessions.live.get((memory.session.owner, memory.session.session_id))
            known = session.tokens if session else []
            while self.cached < min(len(known), len(request.prompt)) and (
                known[self.cached] == request.prompt[self.cached]
            ):
                self.cached += 1

    def cancel(self) -> None:
        self.cancelled = True
        self.engine.cancels += 1

    def info(self, token: int, count: int, *, logprob: float | None = -0.5) -> TokenInfo:
        data = self.engine.tokenizer.token_bytes
        top = tuple((((token + i) % 256), data((token + i) % 256), -0.5 - i) for i in range(count))
        gate = token % 10 / 10 if self.request.gated else None
        return TokenInfo(token=token, data=data(token), logprob=logprob, top=() if logprob is None else top, gate=gate)

    def begin(self) -> None:
        count = self.request.prompt_logprobs
        if count is not None:
            tokens = [
                self.info(token, count, logprob=None if at == 0 else -0.5)
                for at, token in enumerate(self.request.prompt)
            ]
            self.listener(Prompt(tuple(tokens)))

    def step(self) -> bool:
        """Produces one token; True when the request is over."""
        if self.request.pooling is not None:
            self.listener(Embedded(embedding_of(self.request.prompt)))
            return self.end("length")
        limit, context = self.request.max_tokens, self.engine.model.context_length
        unlimited = limit is None or limit > context  # a server has a limit of its own, longer than our context
        if limit is None or (unlimited and not self.request.ignore_eos):
            limit = RUNAWAY if self.request.ignore_eos else context
        if self.engine.fail_after is not None and self.sent >= self.engine.fail_after:
            self.listener(Failed(self.engine.failure))
            return True
        if self.sent >= limit:
            return self.end("length")
        if self.sent >= len(self.source) and not self.request.ignore_eos and (unlimited or self.scripted):
            return self.end("stop")
        token = self.source[self.sent % len(self.source)]
        self.sent += 1
        self.buffer += bytes([token])
        logprobs = self.request.sampling.logprobs
        if self.request.with_tokens:
            self.held.append(self.info(token, logprobs or 0))
        try:
            piece = self.buffer.decode()
        except UnicodeDecodeError:
            return False
        self.buffer = b""
        return self.emit(piece)

    def emit(self, piece: str) -> bool:
        """Sends text that cannot be the beginning of a stop string any more."""
        self.text += piece
        for stop in self.request.stop:
            if stop in self.text:
                before = self.text[: self.text.index(stop)]
                self.send(before)
                return self.end("stop", stop)
        keep = max(
            (n for stop in self.request.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0
        )
        self.send(self.text[: len(self.text) - keep])
        self.text = self.text[len(self.text) - keep :] if keep else ""
        return False

    def send(self, text: str) -> None:
        if text or self.held:
            self.listener(Delta(text, tuple(self.held)))
            self.held = []

    def end(self, reason: Any, stop: str | None = None) -> bool:
        if stop is None:
            self.send(self.text + self.buffer.decode(errors="replace"))
        memory, request = self.request.memory, self.request
        stats = None
        if memory is not None:
            key = memory.session
            live = self.engine.sessions.live
            gone = (
                key is not None
                and self.session is not None
                and (live.get((key.owner, key.session_id)) is not self.session)
            )  # deleted meanwhile, and stays so
            if key is not None and memory.write and request.choice == 0 and not gone:
                session = self.engine.sessions.live.setdefault((key.owner, key.session_id), Session())
                session.tokens = list(request.prompt) + self.source[: self.sent]
            stats = MemoryStats(
                memory_utilization=0.5,
                window_fill_ratio=min(1.0, len(request.prompt) / memory.window_size),
                kept_pairs=min(len(request.prompt), KEPT),
                kept_pairs_capacity=KEPT,
                state=STATE,
                omega_loss=0.25,
                muon_iterations=4 if memory.use_muon else 0,
                blend_ratio_actual=memory.blend_ratio,
                tokens_absorbed=len(request.prompt) // memory.update_frequency * memory.update_frequency,
                session_id=key.session_id if key else None,
                cache_hit=self.cached > 0,
                history="continued" if self.cached else "new",
                tokens_reused=self.cached,
            )
        self.engine.completed += 1
        self.listener(
            Finished(
                reason=reason,
                prompt_tokens=len(request.prompt),
                completion_tokens=self.sent,
                cached_tokens=self.cached,
                seed=self.seed,
                stop=stop,
                prompt_seconds=0.001,
                decode_seconds=0.001 * max(1, self.sent),
                memory=stats,
            )
        )
        return True


def embedding_of(prompt: Sequence[int]) -> np.ndarray:
    """Counts of tokens by their last two bits, at length 1."""
    counts = np.bincount(np.asarray([*prompt]) % 4, minlength=4).astype(np.float32)
    return counts / np.linalg.norm(counts)


class FakeEngine:
    """Implements `EngineProtocol`.

    Attributes:
      delay: seconds a step takes, for all running requests together.
      submit_errors: raised by the next submits, one each.
      fail_after: tokens after which every request fails with `failure`.
      requests: every request that was submitted.
      script: what the next requests are answered, one text each.
      template: what its chat template can do.
      written, variables: the last conversation that was rendered, the tools, and the template's variables.
      grammar_fault: what the next grammar of calls fails with.
    """

    def __init__(
        self,
        *,
        name: str = "fake-7b",
        delay: float = 0.0,
        slots: int = 64,
        root: Path | None = None,
        documents: FakeDocuments | None = None,
        context: int = CONTEXT,
    ) -> None:
        self.model = ModelInfo(
            name=name,
            architecture="llama",
            fingerprint="0123456789abcdef",
            parameters=7,
            size_bytes=8,
            context_length=context,
            vocab_size=ByteTokenizer.vocab_size,
            layers=2,
            embedding_size=4,
            memory_layers=(1, 0),
            memory_dim=96,
            state=STATE,
            kept_pairs_capacity=KEPT,
            adapter=None,
            created=1_700_000_000,
        )
        self.tokenizer = ByteTokenizer()
        self.sessions = FakeSessions(root, name)
        self.lora: tuple[LoraInfo, ...] = ()
        self.fitting_now: Fitting | None = None
        self.prepare: list[Callable[[Any], None]] = []
        self.documents = FakeDocuments() if documents is None else documents
        self.delay, self.slot_count = delay, slots
        self.submit_errors: list[Exception] = []
        self.fail_after: int | None = None
        self.failure: EngineError = EngineError("The engine broke")
        self.requests: list[GenerationRequest] = []
        self.script: list[str] = []
        self.template = TemplateFacts()
        self.written: tuple[list[dict[str, Any]], Any] = [], None
        self.variables: dict[str, Any] = {}
        self.grammar_fault: Exception | None = None
        self.grammars: list[Future[FakeGrammar]] = []
        self.cancels = self.completed = 0
        self.draining = self.closed = False
        self.on_close: Callable[[], None] = lambda: None
        self._active: list[Running] = []
        self._news = threading.Condition()
        self._alive = True
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    # --- the interface -------------------------------------------------------------------------------------------
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        out: list[int] = []
        self.written = [dict(message) for message in messages], tools
        self.variables = dict(variables or {})
        for message in messages:
            text = f"{message['role']}\n{message['content']}"
            out += [START, *self.tokenizer.encode(text, add_special=False, parse_special=False), END]
        return out

    def chat_frame(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatFrame:
        return ChatFrame(preamble=(), closing=(END,), answers=any(one["role"] == "assistant" for one in messages))

    def scale_lora(self, scales: Sequence[float]) -> None:
        self.lora = tuple(replace(one, scale=scale) for one, scale in zip(self.lora, scales, strict=True))

    def fitting(self) -> Fitting | None:
        return self.fitting_now

    def before_memory(self, prepare: Callable[[Any], None]) -> None:
        self.prepare.append(prepare)

    def apply_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        return self.tokenizer.decode(self.render_chat(messages, tools=kwargs.get("tools")))

    def answer_grammar(self, shape: AnswerShape, *, owner: str = "") -> Future[FakeGrammar]:
        future: Future[FakeGrammar] = Future()
        self.grammars.append(future)
        schema = shape.schema or {}
        if schema.get("title") != "never compiled":
            future.set_result(FakeGrammar(shape, owner, ("uniqueItems",) if "uniqueItems" in schema else ()))
        return future

    def call_grammar(self, calls: CallGrammar, *, owner: str = "") -> Future[FakeGrammar]:
        future: Future[FakeGrammar] = Future()
        if self.grammar_fault is None:
            future.set_result(FakeGrammar(calls, owner))
        else:
            future.set_exception(self.grammar_fault)
        return future

    def check_memory(self, memory: MemoryParams) -> None:
        for name, value, most in (
            ("memory_budget", memory.memory_budget, STATE.budget),
            ("kept_pairs", memory.kept_pairs, KEPT),
        ):
            if value is not None and value > most:
                raise InvalidRequest(
                    f"Validation error in field 'atlas.{name}': value must be at most {most}", param=f"atlas.{name}"
                )

    def submit(self, request: GenerationRequest, listener: Listener) -> Running:
        if self.submit_errors:
            raise self.submit_errors.pop(0)
        if self.draining or not self._alive:
            raise Overloaded("The engine is draining")
        if len(request.prompt) > self.model.context_length:
            raise InvalidRequest(
                f"This model's maximum context length is {self.model.context_length} tokens, and the prompt has "
                f"{len(request.prompt)}",
                param="prompt",
                code="context_length_exceeded",
            )
        if request.memory is not None:
            self.check_memory(request.memory)
        running = Running(self, request, listener)
        with self._news:
            self.requests.append(request)
            self._active.append(running)
            self._news.notify()
        return running

    def stats(self) -> EngineStats:
        values = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
        values |= {
            "requests_total": len(self.requests),
            "requests_running": self.running,
            "requests_completed": self.completed,
            "requests_cancelled": self.cancels,
            "memory_saves": self.sessions.saves,
            "memory_loads": self.sessions.loads,
            "memory_utilization": 0.5,
            "window_fill_ratio": 0.25,
            "kept_pairs": KEPT // 4,
            "kept_pairs_capacity": KEPT,
            "state": STATE,
        }
        return EngineStats(**values)  # type: ignore[arg-type]

    def slots(self) -> tuple[SlotInfo, ...]:
        active = list(self._active)
        return tuple(
            SlotInfo(
                id=at,
                busy=at < len(active),
                owner=active[at].request.owner if at < len(active) else None,
                prompt_tokens=len(active[at].request.prompt) if at < len(active) else 0,
                generated_tokens=active[at].sent if at < len(active) else 0,
                session=False,
            )
            for at in range(min(self.slot_count, 4))
        )

    def alive(self) -> bool:
        return self._alive

    def drain(self) -> None:
        self.draining = True

    def close(self, *, timeout: float) -> None:
        self.on_close()
        self.closed = True
        self.die()

    # --- for tests -----------------------------------------------------------------------------------------------
    @property
    def running(self) -> int:
        return len([one for one in self._active if not one.cancelled])

    def die(self) -> None:
        with self._news:
            self._alive = False
            self._news.notify()

    def _run(self) -> None:
        begun: set[int] = set()
        while self._alive:
            with self._news:
                while not self._active and self._alive:
                    self._news.wait()
                active = self._active[: self.slot_count]
            if self.delay:
                time.sleep(self.delay)
            for running in active:
                if running.cancelled:
                    over = True
                else:
                    if id(running) not in begun:
                        begun.add(id(running))
                        running.begin()
                    over = running.step()
                if over:
                    begun.discard(id(running))
                    with self._news:
                        self._active.remove(running)
