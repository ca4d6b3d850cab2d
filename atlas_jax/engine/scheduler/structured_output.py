"""Answers that must match a grammar: which tokens may come next, worked out by llguidance in a process of the schema's own.

A schema, or another grammar, is a stranger's program. Nothing of it runs in this process: `atlas_jax.grammar.worker`
compiles it and follows its answers, under limits of memory and time that the system keeps. The engine's thread sends the
token that was drawn and finds the mask of the next one in a socket; a row whose mask is not there yet sits out a step.
"""

from __future__ import annotations

import asyncio
import hashlib
import select
import socket
import threading
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
import numpy as np

from atlas_jax.engine.api import InvalidRequest, Overloaded
from atlas_jax.engine.scheduler.grammar_processes import Process, Processes, refused
from atlas_jax.gguf import Tokenizer
from atlas_jax.grammar.calls import CallGrammar
from atlas_jax.grammar.shape import AnswerShape
from atlas_jax.grammar.wire import ANSWER, CALLS, COMPLETE, FAILED, TOKEN, VERDICT, mask_bytes, verdict_bytes

T = TypeVar("T")
MAX_SCHEMA_BYTES = 1 << 18
_IDLE_PROCESSES = 8
"""Compiled schemas that are kept for the next request with the same one."""
_REST_SECONDS = 300.0
"""Without a schema or an answer, after which all processes end: that which knows Gemma 3's tokenizer holds 400 MB."""
_REFUSALS = 256
"""Schemas that were refused and are refused again without trying, so that sending one again costs nothing."""
_GONE = (
    "The answer could not be held to its {it}, which is too large: following it took more time or memory than it may"
)
_Key = tuple[str, bytes]


class Grammar:
    """What an answer must match, for any number of answers.

    Attributes:
      ignored: keywords of the schema that are not enforced.
    """

    def __init__(self, home: Grammars, key: _Key, schema: bytes, ignored: tuple[str, ...]) -> None:
        """Use `Grammars.answers`."""
        self.ignored = ignored
        self._home, self._key, self._schema = home, key, schema

    def begin(self) -> Constraint:
        """A new answer."""
        return Constraint(self._home, self._key, self._schema)


class Constraint:
    """How far one answer has come in its grammar; for one thread.

    Attributes:
      ready: whether `allow` may be called: the tokens that may come next are known, and not used yet.
      complete: whether nothing can follow any more.
      socket: where the next tokens become known, once its process has begun with it.
      opening: what gives the socket.
    """

    def __init__(self, home: Grammars, key: _Key, schema: bytes) -> None:
        """Use `Grammar.begin`."""
        self.ready = self.complete = False
        self._home, self._key, self._schema = home, key, schema
        self.opening: Future[tuple[Process, socket.socket]] | None = None
        self._process: Process | None = None
        self.socket: socket.socket | None = None
        self._frame = bytearray(home.verdict_bytes)
        self._filled = 0
        self._mask = np.frombuffer(self._frame, np.int32, home.words, offset=VERDICT.size)

    def open(self) -> None:
        """Begins; the first tokens become known a little later."""
        self.opening = self._home.open(self._key, self._schema)

    def look(self, timeout: float = 0.0) -> bool:
        """Whether it is known how the answer may go on, after waiting for it for `timeout` seconds at most.

        Raises:
          InvalidRequest: working it out took more than it may.
          Overloaded: there is no process to work it out.
        """
        if self.socket is None:
            assert self.opening is not None, "not open"
            try:
                self._process, self.socket = self.opening.result(timeout)
            except TimeoutError:
                if self.opening.done():
                    raise
                return False
        while not (self.ready or self.complete):
            try:
                count = self.socket.recv_into(memoryview(self._frame)[self._filled :], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if timeout <= 0 or not _readable([self.socket], timeout):
                    return False
                continue
            except OSError:
                count = 0
            if not count:
                raise refused(_GONE, self._schema)
            self._filled += count
            if self._filled == len(self._frame):
                self._read()
        return True

    def _read(self) -> None:
        self._filled = 0
        (verdict,) = VERDICT.unpack_from(self._frame)
        if verdict == FAILED:
            reason = bytes(self._frame[VERDICT.size :]).rstrip(b"\0").decode("utf-8", "replace")
            raise refused(f"The answer could not be held to its {{it}}: {reason}", self._schema)
        self.complete = verdict == COMPLETE
        self.ready = not self.complete

    def allow(self, into: np.ndarray) -> None:
        """Writes which tokens may come next, once.

        Args:
          into: int32 [words], one bit per token of the model.
        """
        assert self.ready
        self.ready = False
        shared = min(len(into), len(self._mask))
        into[:shared] = self._mask[:shared]
        into[shared:] = 0

    def take(self, token: int) -> None:
        """Goes on by a token; raises InvalidRequest if the process has ended."""
        assert self.socket is not None
        try:
            self.socket.send(TOKEN.pack(token))
        except OSError:
            raise refused(_GONE, self._schema) from None

    def close(self) -> None:
        """Ends it; idempotent."""
        opening, self.opening = self.opening, None
        process, self._process = self._process, None
        if process is not None and self.socket is not None:
            self._home.ended(process, self.socket)
        elif opening is not None:
            opening.add_done_callback(self._home.opened_in_vain)


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the processes they live in; thread-safe.

    Everything but waiting happens on a thread of its own, which starts with the first schema.

    Attributes:
      verdict_bytes, words: of what a process says about one token, and of the mask in it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.verdict_bytes = verdict_bytes(tokenizer.vocab_size)
        self.words = mask_bytes(tokenizer.vocab_size) // 4
        self._may_end = bool(tokenizer.eog_ids)
        self._makes = Processes(tokenizer)
        self._known: OrderedDict[_Key, Process] = OrderedDict()
        self._refusals: OrderedDict[_Key, InvalidRequest] = OrderedDict()
        self._rest: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def answers(self, shape: AnswerShape, *, owner: str = "") -> Future[Grammar]:
        """Answers of a shape; milliseconds, and a second once for the tokenizer.

        Cancelling the future ends it. It fails with InvalidRequest where the shape is wrong, too large, or uses
        what llguidance does not know, and with Overloaded where no process can be had.

        Args:
          owner: whose turn it uses; compiled grammars are never shared between owners.

        Raises:
          InvalidRequest: the shape is larger than any may be, or the model cannot end an answer.
        """
        return self._wanted(ANSWER, shape, owner)

    def calls(self, calls: CallGrammar, *, owner: str = "") -> Future[Grammar]:
        """Answers with tool calls; otherwise as `answers`."""
        return self._wanted(CALLS, calls, owner)

    def _wanted(self, kind: bytes, wanted: AnswerShape | CallGrammar, owner: str) -> Future[Grammar]:
        field = wanted.field if isinstance(wanted, AnswerShape) else "tools"
        if not self._may_end:
            raise refused(
                "Answers that are held to a grammar need a model with an end-of-generation token, which this one lacks",
                field=field,
            )
        try:
            text = kind + msgspec.json.encode(wanted)
        except (ValueError, RecursionError, TypeError) as error:
            raise refused("the {it} is nested too deep", kind, field) from error
        if len(text) > MAX_SCHEMA_BYTES:
            raise refused(f"the {{it}} is too large: it has {len(text)} bytes of {MAX_SCHEMA_BYTES}", text, field)
        key = owner, hashlib.sha256(text).digest()
        return self._start(self._grammar(key, text))

    def open(self, key: _Key, schema: bytes) -> Future[tuple[Process, socket.socket]]:
        """A new answer's process and socket, for `Constraint`."""
        return self._start(self._begin(key, schema))

    def opened_in_vain(self, opening: Future[tuple[Process, socket.socket]]) -> None:
        """Ends an answer that nobody wanted any more when it had begun."""
        if not opening.cancelled() and opening.exception() is None:
            self.ended(*opening.result())

    def ended(self, process: Process, answer: socket.socket) -> None:
        """Takes note of an answer's end."""
        answer.close()
        with self._lock:
            if self._event_loop is not None:
                self._event_loop.call_soon_threadsafe(self._leave, process)

    def close(self) -> None:
        """Ends all processes and the thread; idempotent."""
        with self._lock:
            self._closed = True
            loop, self._event_loop = self._event_loop, None
        if loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._closed:
                coroutine.close()
                raise Overloaded("The engine is not accepting requests", retry_after=5.0)
            if self._event_loop is None:
                self._event_loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._event_loop.run_forever, name="atlas-grammars", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._event_loop)

    # --- on the thread --------------------------------------------------------------------------------------------
    async def _grammar(self, key: _Key, schema: bytes) -> Grammar:
        process = await self._process(key, schema)
        return Grammar(self, key, schema, process.ignored)

    async def _begin(self, key: _Key, schema: bytes) -> tuple[Process, socket.socket]:
        for _ in range(2):  # it may have ended just now
            process = await self._process(key, schema)
            with suppress(OSError):
                answer = process.begin()
                self._trim()
                return process, answer
        raise Overloaded("The process of this grammar has ended", retry_after=1.0)

    async def _process(self, key: _Key, schema: bytes) -> Process:
        """The process of a schema, which may have to be made first, or again."""
        self._note_use()
        if known := self._living(key):
            return known
        async with self._makes.turn(key[0]):
            if known := self._living(key):  # another request has brought the same
                return known
            if known_fault := self._refusals.get(key):
                raise InvalidRequest(str(known_fault), param=known_fault.param)
            try:
                process = await self._makes.compile(schema)
            except InvalidRequest as error:
                self._refusals[key] = error.with_traceback(None)
                if len(self._refusals) > _REFUSALS:
                    self._refusals.popitem(last=False)
                raise
            self._known[key] = process
            self._trim()
            return process

    def _living(self, key: _Key) -> Process | None:
        process = self._known.get(key)
        if process is None:
            return None
        if not process.alive:
            process.socket.close()
            del self._known[key]
            return None
        self._known.move_to_end(key)
        return process

    def _leave(self, process: Process) -> None:
        process.answers -= 1
        self._trim()
        self._note_use()

    def _note_use(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        self._rest = asyncio.get_running_loop().call_later(_REST_SECONDS, self._end_idle)

    def _end_idle(self) -> None:
        if self._makes.busy or any(process.answers for process in self._known.values()):
            self._note_use()
        else:
            self._stop()

    def _stop(self) -> None:
        for process in self._known.values():
            process.socket.close()
        self._known.clear()
        self._makes.stop()

    def _trim(self) -> None:
        """Ends the processes that nobody has used for longest; never one with an answer under way."""
        idle = [key for key, process in self._known.items() if not process.answers]
        for key in idle[: max(0, len(idle) - _IDLE_PROCESSES)]:
            self._known.pop(key).socket.close()

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._stop()


def wait_for_any(constraints: Sequence[Constraint], timeout: float) -> None:
    """Waits until one of them has something new, unless one is ready already, for `timeout` seconds at most."""
    if any(constraint.ready for constraint in constraints):
        return
    sockets = [constraint.socket for constraint in constraints if constraint.socket is not None]
    if sockets:
        _readable(sockets, timeout)
    else:
        wait(
            [constraint.opening for constraint in constraints if constraint.opening is not None],
            timeout,
            FIRST_COMPLETED,
        )


def _readable(sources: Sequence[socket.socket], timeout: float) -> bool:
    poll = select.poll()
    for source in sources:
        poll.register(source, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
