"""Starts and ends the processes that grammars live in; runs on the event loop of `grammar.Grammars`' thread."""

from __future__ import annotations

import asyncio
import copyreg
import importlib.util
import io
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import MappingProxyType
from typing import Any

import msgspec

from atlas_jax.engine.api import InvalidRequest, Overloaded
from atlas_jax.gguf import Tokenizer
from atlas_jax.grammar.wire import ANSWER, BEGIN, KILL, LENGTH, ORDER, SPAWN, TOKEN, Compiled, frame
from atlas_jax.grammar.worker import COMPILE_SECONDS, MEMORY

log = logging.getLogger("atlas.engine")

_COMPILING_AT_ONCE = 2
_WAITING_PER_OWNER = 256
_WAIT_SECONDS = 60.0
_START_SECONDS = 60.0
"""For the first process, which imports and reads the tokenizer: 1 s on an idle machine, with 262 144 tokens 2 s."""
_COMPILE_WALL_SECONDS = 15.0
"""The processor time is limited by the process itself; this ends one that never gets a processor."""
_STOP_SECONDS = 1.0
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from atlas_jax.grammar.worker import main; main()"
_TOO_LARGE = (
    f"too large: compiling it takes more than {COMPILE_SECONDS:.0f} s of processor time or {MEMORY >> 20} MiB of memory"
)


class _Named(msgspec.Struct):
    """What errors say of an `AnswerShape`."""

    kind: str = "json"
    field: str = "response_format"


def refused(message: str, wanted: bytes = b"", field: str = "") -> InvalidRequest:
    """The error of a grammar that cannot be had.

    Args:
      message: with `{it}` for what it is called.
      wanted: the frame that says what it is.
      field: which of a call grammar's schemas.
    """
    named = _Named(field="tools")
    if wanted[:1] == ANSWER:
        with suppress(msgspec.MsgspecError):
            named = msgspec.json.decode(wanted[1:], type=_Named)
    elif not wanted:
        named = _Named()
    it = "JSON schema" if named.kind == "json" else {"choice": "list of choices"}.get(named.kind, named.kind)
    return InvalidRequest(message.replace("{it}", it, 1), param=field or named.field)


class Process:
    """A process with one compiled schema.

    Attributes:
      socket: takes one end of a socket pair for every answer; the process ends when it is closed.
      ignored: keywords of the schema that are not enforced.
      answers: how many are under way.
    """

    def __init__(self, orders: socket.socket, ignored: tuple[str, ...]) -> None:
        """Use `Processes.compile`."""
        self.socket = orders
        self.ignored = ignored
        self.answers = 0

    @property
    def alive(self) -> bool:
        """Whether it still listens."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def begin(self) -> socket.socket:
        """A socket for a new answer, which has begun; raises OSError if the process is gone."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self.socket, [b"+"], [theirs.fileno()])
            ours.send(TOKEN.pack(BEGIN))
        except OSError:
            ours.close()
            raise
        self.answers += 1
        return ours


class Processes:
    """Makes processes, at most two at once, and one at a time for each owner.

    All are forks of a first one that knows the tokenizer and nothing else: it holds no socket, file or lock of this
    process, and never loads JAX. It starts with the first schema, and again if it has died.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template: _Template | None = None
        self._starting = asyncio.Lock()
        self._places = asyncio.Semaphore(_COMPILING_AT_ONCE)
        self._owners: dict[str, _Line] = {}
        self._number = 0

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """A place to compile in. Owners get theirs in turn, for each waits with one schema at most.

        Raises:
          Overloaded: too many of this owner wait, or none became free in time.
        """
        line = self._owners.setdefault(owner, _Line())
        if line.waiting >= _WAITING_PER_OWNER:
            raise Overloaded("Too many grammars are waiting to be compiled", retry_after=1.0)
        line.waiting += 1
        try:
            async with asyncio.timeout(_WAIT_SECONDS) as limit, line.lock, self._places:
                limit.reschedule(None)
                yield
        except TimeoutError:
            raise Overloaded("No grammar could be compiled in time", retry_after=5.0) from None
        finally:
            line.waiting -= 1
            if not line.waiting:
                self._owners.pop(owner, None)

    @property
    def busy(self) -> bool:
        """Whether a schema is being compiled, or waits for it."""
        return bool(self._owners)

    async def compile(self, schema: bytes) -> Process:
        """A process for a schema; if the caller is cancelled it is killed.

        Raises:
          InvalidRequest: the schema is wrong, or takes more than a process may.
          Overloaded: there is no process to be had.
        """
        for _ in range(2):  # the first process may have died since the last schema
            template = await self._running()
            ours, theirs = _pair()
            self._number = number = (self._number + 1) & 0xFFFFFFFF
            try:
                with theirs:
                    await template.order(SPAWN, number, theirs)
                if not await _begun(ours):
                    raise ConnectionError
                return await _compiled(ours, schema)
            except OSError:
                ours.close()
                if await template.lives():  # it could not fork
                    break
                self._forget(template)
            except BaseException:
                ours.close()
                with suppress(OSError):
                    await asyncio.shield(template.order(KILL, number))
                raise
        raise Overloaded("Grammars cannot be compiled now", retry_after=5.0)

    async def _running(self) -> _Template:
        async with self._starting:
            if self._template is None:
                if (
                    importlib.util.find_spec("llguidance") is None
                ):  # an extra of its own would be one more thing to know
                    raise refused("Answers that are held to a grammar need the package llguidance")
                self._template = await _Template.start(self._tokenizer)
            return self._template

    def _forget(self, template: _Template) -> None:
        if self._template is template:
            self._template = None
            log.warning("The process that compiles grammars has ended; the next grammar starts another")
        template.stop()

    def stop(self) -> None:
        """Ends all processes."""
        if self._template is not None:
            self._template.stop()
            self._template = None


class _Line:
    """An owner's schemas."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class _Template:
    """The process all others are forked from."""

    def __init__(self, control: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Use `start`."""
        self._control = control
        self._process = process

    @classmethod
    async def start(cls, tokenizer: Tokenizer) -> _Template:
        """Starts one; raises Overloaded if the system has no room for it."""
        control, theirs = _pair()
        descriptor = theirs.fileno()
        one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")  # it forks
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, str(descriptor), json.dumps(sys.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # what a hostile schema makes llguidance say is nobody's
                    pass_fds=(descriptor,),
                    env={**os.environ, **one_thread, "TOKENIZERS_PARALLELISM": "false"},
                    start_new_session=True,  # Ctrl-C is for the server, which lets its answers end
                )
        except OSError as error:
            control.close()
            log.exception("The process that compiles grammars could not be started")
            raise Overloaded("Grammars cannot be compiled now", retry_after=5.0) from error
        template = cls(control, process)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await asyncio.get_running_loop().sock_sendall(control, frame(_pickled(tokenizer)))
        except (OSError, TimeoutError) as error:
            template.stop()
            raise Overloaded("Grammars cannot be compiled now", retry_after=5.0) from error
        except BaseException:
            template.stop()
            raise
        return template

    async def order(self, kind: bytes, number: int, given: socket.socket | None = None) -> None:
        """Tells it to fork a process that listens at `given`, or to kill one; raises OSError if it is gone."""
        while True:
            try:
                socket.send_fds(self._control, [ORDER.pack(kind, number)], [] if given is None else [given.fileno()])
                return
            except BlockingIOError:
                await asyncio.sleep(0.01)

    async def lives(self) -> bool:
        """Whether it still does, some time after one of its sockets has closed."""
        await asyncio.sleep(0.1)
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends it, and with it its forks."""
        self._control.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, of which the first does not block; raises Overloaded if no file descriptors are left."""
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        raise Overloaded("Grammars cannot be compiled now", retry_after=5.0) from error
    ours.setblocking(False)
    return ours, theirs


async def _begun(orders: socket.socket) -> bool:
    try:
        async with asyncio.timeout(_START_SECONDS):
            return bool(await asyncio.get_running_loop().sock_recv(orders, 1))
    except TimeoutError:
        raise Overloaded("Grammars cannot be compiled now", retry_after=5.0) from None


async def _compiled(orders: socket.socket, schema: bytes) -> Process:
    """Hands a process its schema."""
    try:
        async with asyncio.timeout(_COMPILE_WALL_SECONDS):
            await asyncio.get_running_loop().sock_sendall(orders, frame(schema))
            (length,) = LENGTH.unpack(await _exactly(orders, LENGTH.size))
            compiled = msgspec.json.decode(await _exactly(orders, length), type=Compiled)
    except TimeoutError:
        raise Overloaded("The machine is too busy to compile this grammar", retry_after=10.0) from None
    except OSError:
        raise refused(f"The {{it}} is {_TOO_LARGE}", schema) from None
    if compiled.error:
        raise refused(f"{{it}}: {compiled.error}", schema, compiled.field)
    return Process(orders, compiled.ignored)


async def _exactly(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(source, size - len(data))
        if not part:
            raise ConnectionError
        data += part
    return bytes(data)


class _Pickler(pickle.Pickler):
    """Can write the read-only mappings of a tokenizer."""

    dispatch_table = copyreg.dispatch_table.copy()


def _read_only(given: Any) -> tuple[type[dict[Any, Any]], tuple[dict[Any, Any]]]:
    return dict, (dict(given),)


_Pickler.dispatch_table[MappingProxyType] = _read_only


def _pickled(tokenizer: Tokenizer) -> bytes:
    out = io.BytesIO()
    _Pickler(out, pickle.HIGHEST_PROTOCOL).dump(tokenizer)
    return out.getvalue()
