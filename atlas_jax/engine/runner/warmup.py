"""Compiles every program the engine can need, the likely ones before it serves and the rest in the background.

From then on nothing compiles, whatever lengths, settings and numbers of clients come. Until then a request that needs a
program nobody has compiled yet waits for it.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from atlas_jax.engine.runner.base import ModelRunner

log = logging.getLogger("atlas.engine")

_NICE = 10
_REST = 20.0
"""How many times as long as the last program took to compile the next one waits while requests run. XLA compiles on threads
of its own, which nothing makes nice: one stream of an 8B model ran at half its speed for two minutes."""
_LOOK_SECONDS = 0.05


class WarmUp:
    """A thread that compiles what is left, at low priority."""

    def __init__(self, runner: ModelRunner, busy: Callable[[], bool]) -> None:
        """Starts nothing yet.

        Args:
          busy: whether requests run; called on any thread.
        """
        self._runner = runner
        self._busy = busy
        self._stop = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="atlas-warm-up", daemon=True)

    def start(self, *, first_pages: int) -> None:
        """Compiles what one client with a ring of `first_pages` pages needs, then starts on the rest.

        Args:
          first_pages: one of the buckets.
        """
        runner, started = self._runner, time.monotonic()
        log.info("Compiling the first programs")
        with ThreadPoolExecutor(2) as pool:  # XLA compiles one program on one core for most of the time
            tasks = [pool.submit(runner.compile_decode, runner.buckets.rows[0], first_pages)]
            tasks += [pool.submit(runner.compile_prefill, first_pages, length) for length in runner.chunks]
            for task in tasks:
                task.result()
        log.info("Compiled them in %.1f s; the rest follow in the background", time.monotonic() - started)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until everything is compiled; tells whether it is."""
        return self._done.wait(timeout)

    @property
    def done(self) -> bool:
        """Whether everything is compiled."""
        return self._done.is_set()

    def stop(self, timeout: float) -> None:
        """Ends the thread after the program it is at, and waits for it: a process that exits in mid-compile aborts.

        Where that takes longer, the end of the interpreter waits for it instead.
        """
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.is_alive():
            atexit.register(self._thread.join)

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # on Linux: this thread alone
        started = time.monotonic()
        for task in self._tasks():
            if self._stop.is_set():
                return
            begun = time.monotonic()
            try:
                task()
            except Exception:
                log.exception("Warm-up failed; programs will be compiled when they are needed")
                return
            self._rest(time.monotonic() - begun)
        log.info("Every program is compiled (%.0f s in the background)", time.monotonic() - started)
        self._done.set()

    def _rest(self, seconds: float) -> None:
        """Leaves the cores to requests after a program that took so long."""
        until = time.monotonic() + _REST * seconds
        while self._busy() and time.monotonic() < until and not self._stop.wait(_LOOK_SECONDS):
            pass

    def _tasks(self) -> list[Callable[[], None]]:
        """Everything, what few clients with short texts need first."""
        runner, buckets = self._runner, self._runner.buckets
        ranked: list[tuple[float, Callable[[], None]]] = []

        def add(rank: float, function: Callable[..., None], *args: int) -> None:
            ranked.append((rank, functools.partial(function, *args)))

        for i, length in enumerate(reversed(runner.chunks)):
            add(2.5 + i, runner.compile_scored_prefill, length)
            add(2.5 + i, runner.compile_pooled_prefill, length)
            for j, pages in enumerate(buckets.pages):
                add(i + j, runner.compile_prefill, pages, length)
        for i, rows in enumerate(buckets.rows):
            for j, pages in enumerate(buckets.pages):
                add(i + j, runner.compile_decode, rows, pages)
                add(i + j, runner.compile_row_moves, rows, pages)
                add(i + j + 0.5, runner.compile_plain_decode, rows, pages)
                add(i + j + 1.5, runner.compile_monolithic_step, rows, pages)
        return [task for _, task in sorted(ranked, key=lambda entry: entry[0])]
