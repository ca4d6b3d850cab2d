"""Process 0's side: the log of steps, and a runner whose calls are written into it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np

from atlas_jax.engine.api import MemoryParams, StateBytes
from atlas_jax.engine.hosts import messages
from atlas_jax.engine.hosts.connection import Connection
from atlas_jax.engine.hosts.messages import NONE, Answer, Call, Compiled, Entry, Hello, arrays_of, encode
from atlas_jax.engine.hosts.whole_rows import WholeRows
from atlas_jax.engine.runner.base import ModelRunner, NewPage, PrefillStep
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.sessions.lora import LoraScales
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.kernels.sampling import SamplingState
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.recall.recall_state import RecallSettings

log = logging.getLogger("atlas.engine")


class HostsError(RuntimeError):
    """The processes of an engine cannot work together, or no longer; the message says why."""


class StepLog:
    """Sends every call to the other processes before it is made, in one order for all threads.

    Attributes:
      failure: why nothing can be launched any more, or None.
    """

    def __init__(self, followers: Mapping[int, Connection]) -> None:
        """Begins to listen to the others.

        Args:
          followers: connections by the number of the process.
        """
        self.failure: str | None = None
        self._followers = dict(followers)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._known: dict[int, int] = {}
        self._dropped: deque[int] = deque()
        self._answers: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._ending = False
        self._listeners = [
            threading.Thread(target=self._listen, args=item, name=f"atlas-process-{item[0]}", daemon=True)
            for item in self._followers.items()
        ]
        for listener in self._listeners:
            listener.start()

    # --- the others ------------------------------------------------------------------------------------------------
    def agree(self, facts: Mapping[str, str]) -> None:
        """Waits until all others have opened the model; raises HostsError if they cannot follow."""
        self._send(encode(Hello(dict(facts))))
        for _ in self._followers:
            process, refusal = self._answers.get()
            if refusal:
                self.fail(f"Process {process} cannot follow: {refusal}")
                break
        if self.failure is not None:
            raise HostsError(self.failure)

    def _listen(self, process: int, connection: Connection) -> None:
        answered, refusal = False, ""
        while (data := connection.receive()) is not None:
            answered, refusal = True, msgspec.msgpack.decode(data, type=Answer).refusal
            self._answers.put((process, refusal))
        if not self._ending and not refusal:  # who refuses goes, and `agree` says why
            self._lose(process)
        if not answered:
            self._answers.put((process, "it has gone"))

    def _lose(self, process: int) -> None:
        """Whoever notices first, the words are the same."""
        self.fail(f"Process {process} has gone; every step needs all processes, so this one ends too")

    def fail(self, why: str) -> None:
        """Ends it: the others notice, and whoever asks `failure`."""
        if self.failure is None:
            self.failure = why
            log.critical("%s", why)
        for connection in self._followers.values():
            connection.close()

    def end(self, timeout: float) -> None:
        """Tells the others that nothing more comes, and waits until they are gone; idempotent."""
        with self._lock:
            if self._ending or self.failure is not None:
                return
            self._ending = True
            with contextlib.suppress(HostsError):
                self._send(encode(Entry([], messages.End())))
        until = time.monotonic() + timeout
        for listener in self._listeners:
            listener.join(max(until - time.monotonic(), 0.0))

    def _send(self, data: bytes) -> None:
        for process, connection in self._followers.items():
            try:
                connection.send(data)
            except OSError as error:
                self._lose(process)
                raise HostsError(self.failure) from error

    # --- calls -----------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """In which a call is made that the others make too. If it fails here, nobody knows what it has left there."""
        with self._lock:
            self._tell(call)
            try:
                yield
            except BaseException:
                self.fail("A step has failed in this process, and may have been run in the others")
                raise

    def tell(self, call: Call) -> None:
        """Sends a call that launches nothing."""
        with self._lock:
            self._tell(call)

    def _tell(self, call: Call) -> None:
        if self.failure is not None or self._ending:
            raise HostsError(self.failure or "The engine has ended")
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        self._send(encode(Entry(dropped, call)))

    # --- numbers ---------------------------------------------------------------------------------------------------
    def new(self) -> int:
        """A number for what a call will make."""
        return next(self._numbers)

    def name(self, made: Any, number: int) -> None:
        """Gives what a call has made its number; it is dropped with the last reference."""
        key = id(made)
        self._known[key] = number
        weakref.finalize(made, self._gone, key, number).atexit = False

    def number(self, made: Any) -> int:
        """The number of what a call has made; NONE if it is of another origin."""
        return self._known.get(id(made), NONE)

    def drop(self, number: int) -> None:
        """Forgets a number that has no object."""
        self._dropped.append(number)

    def _gone(self, key: int, number: int) -> None:
        self._known.pop(key, None)
        self._dropped.append(number)


class LeaderRunner(ModelRunner):
    """A runner over devices of several processes, as the scheduler of process 0 sees it."""

    def __init__(self, runner: PretrainedRunner, log: StepLog) -> None:
        """Takes over a runner that has run nothing that the others' have not."""
        super().__init__(runner.capabilities, runner.vocab, runner.embed, runner.buckets, runner.chunks)
        self._runner, self._log = runner, log
        self._whole = WholeRows(runner)
        self.sequences = runner.sequences

    @contextlib.contextmanager
    def _call(self, call: Call) -> Iterator[None]:
        with self._log.call(call):
            yield
            self.sequences = self._runner.sequences

    def _named(self, made: Any, number: int) -> Any:
        self._log.name(made, number)
        return made

    # --- what needs no device --------------------------------------------------------------------------------------
    def check(self, memory: MemoryParams) -> None:
        """See `ModelRunner`."""
        self._runner.check(memory)

    def shape(self, memory: MemoryParams, lora: LoraScales = ()) -> SessionShape:
        """See `ModelRunner`."""
        return self._runner.shape(memory, lora)

    def state_bytes(self, shape: SessionShape) -> StateBytes:
        """See `ModelRunner`."""
        return self._runner.state_bytes(shape)

    def row_shapes(self, pages: int) -> Sequences:
        """See `ModelRunner`."""
        return self._runner.row_shapes(pages)

    def ring_pages(self, plan: PageSchedule, tokens: int) -> int:
        """See `ModelRunner`."""
        return self._runner.ring_pages(plan, tokens)

    @property
    def rows(self) -> int:
        """See `ModelRunner`."""
        return self._runner.rows

    @property
    def pages(self) -> int:
        """See `ModelRunner`."""
        return self._runner.pages

    @property
    def widths(self) -> tuple[int, ...]:
        """See `ModelRunner`."""
        return self._runner.widths

    # --- rows ------------------------------------------------------------------------------------------------------
    def new_row(self, pages: int, lora: LoraScales = ()) -> Sequences:
        """See `ModelRunner`."""
        number = self._log.new()
        with self._call(messages.NewRow(number, pages, lora)):
            row: Sequences = self._named(self._runner.new_row(pages, lora), number)
            return row

    def resume_row(self, saved: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """See `ModelRunner`; a row without a number was at rest, and is sent."""
        known, number = self._log.number(saved), self._log.new()
        arrays: list[np.ndarray] = []
        if known == NONE:
            saved = jax.tree.map(np.asarray, saved)
            arrays = jax.tree.leaves(saved)
        where = pages, position, slot
        with self._call(messages.ResumeRow(number, known, arrays, saved.memory is not None, *where)):
            row: Sequences = self._named(self._runner.resume_row(saved, *where), number)
            return row

    def prefix_row(self, row: Sequences) -> Sequences:
        """See `ModelRunner`."""
        number = self._log.new()
        with self._call(messages.PrefixRow(number, self._log.number(row))):
            prefix: Sequences = self._named(self._runner.prefix_row(row), number)
            return prefix

    def save_row(self, row: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """See `ModelRunner`; what is saved is whole on every device, so that this host can read it."""
        where = pages, position, slot
        with self._call(messages.SaveRow(self._log.number(row), *where)):
            return self._whole(self._runner.save_row(row, *where))

    def prefill(
        self, row: Sequences, settings: RecallSettings, tokens: Sequence[int], page: NewPage | None = None
    ) -> Iterator[PrefillStep]:
        """See `ModelRunner`."""
        steps = self._log.new()
        call = messages.Prefill(steps, self._log.number(row), arrays_of(settings), list(tokens), page)
        yield from self._steps(call, lambda: self._runner.prefill(row, settings, tokens, page))

    def prefill_scored(
        self,
        row: Sequences,
        settings: RecallSettings,
        tokens: Sequence[int],
        following: Sequence[int],
        page: NewPage | None = None,
        *,
        alternatives: bool,
    ) -> Iterator[PrefillStep]:
        """See `ModelRunner`."""
        steps, made = self._log.new(), arrays_of(settings)
        read = list(tokens), list(following)
        call = messages.PrefillScored(steps, self._log.number(row), made, *read, page, alternatives)
        yield from self._steps(
            call,
            lambda: self._runner.prefill_scored(row, settings, tokens, following, page, alternatives=alternatives),
        )

    def prefill_pooled(
        self,
        row: Sequences,
        settings: RecallSettings,
        tokens: Sequence[int],
        pooled: np.ndarray | jax.Array,
        page: NewPage | None = None,
        *,
        mean: bool,
    ) -> Iterator[PrefillStep]:
        """See `ModelRunner`."""
        steps, before = self._log.new(), self._log.number(pooled)
        call = messages.PrefillPooled(
            *(steps, self._log.number(row), arrays_of(settings), list(tokens), before, pooled.shape[1], page, mean)
        )
        yield from self._steps(
            call, lambda: self._runner.prefill_pooled(row, settings, tokens, pooled, page, mean=mean)
        )

    def _steps(
        self,
        call: messages.Prefill | messages.PrefillScored | messages.PrefillPooled,
        begin: Callable[[], Iterator[PrefillStep]],
    ) -> Iterator[PrefillStep]:
        with self._call(call):
            steps = begin()
        try:
            while True:
                row, pooled = self._log.new(), self._log.new()
                with self._call(messages.Next(call.steps, row, pooled)):
                    step = next(steps, None)
                    if step is None:
                        return
                    self._log.name(step.row, row)
                    if step.pooled is not None:
                        self._log.name(step.pooled, pooled)
                yield step
        finally:
            self._log.drop(call.steps)

    # --- the decode batch ------------------------------------------------------------------------------------------
    def resize(self, rows: int, pages: int, moves: dict[int, int]) -> None:
        """See `ModelRunner`."""
        with self._call(messages.Resize(rows, pages, moves)):
            self._runner.resize(rows, pages, moves)

    def insert(
        self,
        index: int,
        row: Sequences,
        token: int,
        text: np.ndarray,
        sampling: SamplingState,
        settings: RecallSettings,
        *,
        with_memory: bool,
    ) -> None:
        """See `ModelRunner`."""
        how = arrays_of(sampling), arrays_of(settings), with_memory
        with self._call(messages.Insert(index, self._log.number(row), token, text, *how)):
            self._runner.insert(index, row, token, text, sampling, settings, with_memory=with_memory)

    def extract(self, index: int) -> Sequences:
        """See `ModelRunner`."""
        number = self._log.new()
        with self._call(messages.Extract(number, index)):
            row: Sequences = self._named(self._runner.extract(index), number)
            return row

    def decode(
        self,
        wanted: np.ndarray,
        allowed: np.ndarray | None = None,
        pages: Mapping[int, NewPage] | None = None,
        width: int | None = None,
    ) -> StepOutput:
        """See `ModelRunner`; the width is said, for what is compiled by now may differ between processes."""
        width = width or self._runner.width
        with self._call(messages.Decode(wanted, allowed, dict(pages or {}), width)):
            return self._runner.decode(wanted, allowed, pages, width)

    # --- compiling ahead -------------------------------------------------------------------------------------------
    def _compile(self, method: Compiled, *arguments: int) -> None:
        try:
            self._log.tell(messages.Compile(method, list(arguments)))
        except HostsError:  # nothing more will run, and what has happened has been said
            return
        getattr(self._runner, method)(*arguments)

    def compile_prefill(self, pages: int, length: int) -> None:
        """See `ModelRunner`; so the others."""
        self._compile("compile_prefill", pages, length)

    def compile_scored_prefill(self, length: int) -> None:
        """See `ModelRunner`."""
        self._compile("compile_scored_prefill", length)

    def compile_pooled_prefill(self, length: int) -> None:
        """See `ModelRunner`."""
        self._compile("compile_pooled_prefill", length)

    def compile_decode(self, rows: int, pages: int) -> None:
        """See `ModelRunner`."""
        self._compile("compile_decode", rows, pages)

    def compile_plain_decode(self, rows: int, pages: int) -> None:
        """See `ModelRunner`."""
        self._compile("compile_plain_decode", rows, pages)

    def compile_monolithic_step(self, rows: int, pages: int) -> None:
        """See `ModelRunner`."""
        self._compile("compile_monolithic_step", rows, pages)

    def compile_row_moves(self, rows: int, pages: int) -> None:
        """See `ModelRunner`; and how a row becomes whole."""
        self._compile("compile_row_moves", rows, pages)
        self._whole.compile(pages)
