"""The other processes' side: makes the calls that process 0 has made, in their order."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import jax
import msgspec
import numpy as np

from atlas_jax.engine.hosts import messages
from atlas_jax.engine.hosts.connection import Connection
from atlas_jax.engine.hosts.leader import HostsError
from atlas_jax.engine.hosts.messages import NONE, Answer, Call, Entry, Hello, decode_entry, encode
from atlas_jax.engine.hosts.whole_rows import WholeRows
from atlas_jax.engine.runner.base import PrefillStep
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from atlas_jax.kernels.sampling import SamplingState
from atlas_jax.recall.recall_state import RecallSettings

log = logging.getLogger("atlas.engine")

_NICE = 10
_LOST_SECONDS = 10.0
"""How long a step may go on waiting for a process 0 that is gone, before this process ends as it is."""
_STOP_SECONDS = 15.0
"""How long a process that is told to stop waits for process 0 to say so: that has requests to end and sessions to save."""


class Follower:
    """A runner that is called as process 0's has been."""

    def __init__(self, runner: PretrainedRunner) -> None:
        self._runner = runner
        self._whole = WholeRows(runner)
        self._made: dict[int, Any] = {}
        self._compiling = ThreadPoolExecutor(1, "atlas-warm-up", initializer=_be_nice)

    @property
    def held(self) -> int:
        """How many things it holds that process 0 can name."""
        return len(self._made)

    def run(self, entry: Entry) -> None:
        """Makes a call."""
        for number in entry.dropped:
            self._made.pop(number, None)
        self._run(entry.call)

    def close(self) -> None:
        """Compiles nothing more in the background; the program it is at is not waited for."""
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def _run(self, call: Call) -> None:
        runner, made = self._runner, self._made
        match call:
            case messages.Decode():
                runner.decode(call.wanted, call.allowed, call.pages, call.width)
            case messages.Next():
                step = next(made[call.steps], None)
                if step is not None:
                    made[call.row] = step.row
                    if step.pooled is not None:
                        made[call.pooled] = step.pooled
            case messages.Prefill() | messages.PrefillScored() | messages.PrefillPooled():
                made[call.steps] = self._steps(call)
            case messages.NewRow():
                made[call.row] = runner.new_row(call.pages, call.lora)
            case messages.ResumeRow():
                saved = self._sent(call) if call.saved == NONE else made[call.saved]
                made[call.row] = runner.resume_row(saved, call.pages, call.position, call.slot)
            case messages.PrefixRow():
                made[call.row] = runner.prefix_row(made[call.of])
            case messages.SaveRow():
                self._whole(runner.save_row(made[call.row], call.pages, call.position, call.slot))
            case messages.Resize():
                runner.resize(call.rows, call.pages, call.moves)
            case messages.Insert():
                how = SamplingState(*call.sampling), RecallSettings(*call.settings)  # type: ignore[arg-type]
                row = made[call.row]
                runner.insert(call.index, row, call.token, call.text, *how, with_memory=call.with_memory)
            case messages.Extract():
                made[call.row] = runner.extract(call.index)
            case messages.Compile():
                self._compiling.submit(self._compile, call)

    def _steps(self, call: messages.Prefill | messages.PrefillScored | messages.PrefillPooled) -> Iterator[PrefillStep]:
        runner, row = self._runner, self._made[call.row]
        settings = RecallSettings(*call.settings)  # type: ignore[arg-type]
        match call:
            case messages.Prefill():
                return runner.prefill(row, settings, call.tokens, call.page)
            case messages.PrefillScored():
                alternatives = call.alternatives
                return runner.prefill_scored(
                    row, settings, call.tokens, call.following, call.page, alternatives=alternatives
                )
            case messages.PrefillPooled():
                first = call.pooled == NONE
                pooled = np.zeros((1, call.zeros), np.float32) if first else self._made[call.pooled]
                return runner.prefill_pooled(row, settings, call.tokens, pooled, call.page, mean=call.mean)

    def _sent(self, call: messages.ResumeRow) -> Sequences:
        """A row of the arrays that were sent: it has the structure of every row of this model."""
        shapes = self._runner.row_shapes(self._runner.buckets.pages[0])
        if not call.with_memory:
            shapes = dataclasses.replace(shapes, memory=None)
        row: Sequences = jax.tree.unflatten(jax.tree.structure(shapes), call.arrays)
        return row

    def _compile(self, call: messages.Compile) -> None:
        try:
            getattr(self._runner, call.method)(*call.arguments)
            if call.method == "compile_row_moves":
                self._whole.compile(call.arguments[1])
        except Exception:
            log.exception("Warm-up failed; programs will be compiled when they are needed")


def follow(follower: Follower, connection: Connection, facts: Mapping[str, str]) -> None:
    """Makes the calls of process 0 until it says that it has ended.

    Args:
      facts: what must be the same in process 0, by name.

    Raises:
      HostsError: process 0 is gone, or has opened something else.
    """
    _agree(connection, facts)
    entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
    ended = threading.Event()
    reader = threading.Thread(target=_read, args=(connection, entries, ended), name="atlas-process-0", daemon=True)
    reader.start()
    try:
        while (entry := entries.get()) is None or not isinstance(entry.call, messages.End):
            if entry is None:
                raise HostsError("Process 0 has gone")
            follower.run(entry)
    finally:
        ended.set()
        follower.close()
        connection.close()


def _agree(connection: Connection, facts: Mapping[str, str]) -> None:
    data = connection.receive()
    if data is None:
        raise HostsError("Process 0 has gone")
    wanted = msgspec.msgpack.decode(data, type=Hello).facts
    others = sorted(name for name in wanted.keys() | facts.keys() if wanted.get(name) != facts.get(name))
    said = ", ".join(f"{name} is {facts.get(name)} and {wanted.get(name)} in process 0" for name in others)
    connection.send(encode(Answer(said)))
    if said:
        raise HostsError(said)


def _read(connection: Connection, entries: queue.SimpleQueue[Entry | None], ended: threading.Event) -> None:
    """Takes in what is sent, so that process 0 never waits for a step here; ends the process where that cannot end itself."""
    while (data := connection.receive()) is not None:
        entry = decode_entry(data)
        entries.put(entry)
        if isinstance(entry.call, messages.End):
            return
    entries.put(None)
    if not ended.wait(_LOST_SECONDS):
        log.critical("Process 0 has gone while a step waits for it")
        logging.shutdown()
        os._exit(1)


def await_process_0_on_signals() -> None:
    """From now on a signal to stop ends this process only if process 0 does not end it in time, or with the second one."""
    stopping = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()
        log.info("Told to stop; waiting up to %.0f s for process 0 to end", _STOP_SECONDS)
        timer = threading.Timer(_STOP_SECONDS, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _be_nice() -> None:
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # on Linux: this thread alone
