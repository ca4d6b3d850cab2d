"""The program that compiles grammars and says which tokens may come next, away from the server's memory and threads.

It learns the tokenizer and then only waits: every schema is compiled in a fork of it, which afterwards serves the answers
under that schema, and whose memory and time the system limits. A schema that wants more ends its own process, at most.
The server is the parent; when its end of a socket closes, whoever listens at the other ends.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import random
import resource
import select
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from atlas_jax.grammar.answer import Answer, Tokens
from atlas_jax.grammar.calls import CallGrammar, lark
from atlas_jax.grammar.schema import adapt, explained, not_enforced
from atlas_jax.grammar.shape import AnswerShape, lark_of
from atlas_jax.grammar.wire import (
    BEGIN,
    BEGUN,
    CALLS,
    FAILED,
    KILL,
    LENGTH,
    MAY_GO_ON,
    ORDER,
    SPAWN,
    TOKEN,
    VERDICT,
    Compiled,
    frame,
    verdict_bytes,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

MEMORY = 128 << 20
"""Bytes a grammar may take beside the tokenizer. An enumeration of 20 000 words takes 14 MiB, `multipleOf: 1000003` 274."""
COMPILE_SECONDS = 2.0
"""Of processor time. Ordinary schemas take 1 to 50 ms."""
_STEP_SECONDS = 0.5
"""Of processor time, for one token. Ordinary ones take 0.1 ms, the worst that llguidance's limits let through 20."""
_NICE = 10
"""How far below the engine's threads: where both want a core, the engine's neighbours of this answer go first."""
_WALKS, _WALK = 3, 24
_WHITESPACE = "[ \\n\\t]{0,16}"
"""Between two parts of a JSON text. Without a bound a small model goes on making blank lines until its tokens are used up."""
_COMPACT: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,
}
"""Arguments of tool calls, spelled as chat templates spell them (`tojson`): when a client sends them back in the conversation
they are the tokens that the model wrote, so that a session goes on."""
_ROW_ITEMS = 4500
"""Ways on from one place in an answer: about 1 100 properties that may all be left out."""
_PARENT_DIED = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Serves the parent, whose socket is file descriptor `sys.argv[1]`, until it closes it."""
    control = socket.socket(fileno=int(sys.argv[1]))
    pickled = _frame_from(control)
    if pickled is None:
        return
    tokens = Tokens(pickle.loads(pickled))  # written by the parent
    del pickled
    gc.collect()
    gc.freeze()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    children: dict[int, int] = {}
    try:
        while _obey(control, tokens, children):
            pass
    finally:
        for pid in children.values():
            os.kill(pid, signal.SIGKILL)


def _obey(control: socket.socket, tokens: Tokens, children: dict[int, int]) -> bool:
    """Does one thing the parent orders; False once it is gone."""
    ready, _, _ = select.select([control], [], [], 1.0 if children else None)
    for number, pid in list(children.items()):
        if os.waitpid(pid, os.WNOHANG)[0]:
            del children[number]
    if not ready:
        return True
    order, descriptors, _, _ = socket.recv_fds(control, ORDER.size, 1)
    if len(order) < ORDER.size:
        return False
    kind, number = ORDER.unpack(order)
    if kind == KILL and number in children:
        os.kill(children[number], signal.SIGKILL)
    if kind == SPAWN and descriptors:
        template = os.getpid()
        with suppress(OSError):  # no more processes: the parent sees its socket close
            pid = os.fork()
            if pid == 0:
                control.close()
                _run(socket.socket(fileno=descriptors[0]), tokens, template)
            children[number] = pid
        os.close(descriptors[0])
    return True


def _run(orders: socket.socket, tokens: Tokens, template: int) -> None:
    """The life of a fork."""
    try:
        _limit(template)
        orders.sendall(BEGUN)
        schema = _frame_from(orders)
        if schema is not None:
            with _Limited(COMPILE_SECONDS):
                grammar, compiled = _compile(schema, tokens)
            orders.sendall(frame(msgspec.json.encode(compiled)))
            if grammar is not None:
                _serve(orders, grammar)
    finally:
        os._exit(0)  # whatever happened: the parent sees its sockets close


def _limit(template: int) -> None:
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    if os.getppid() != template:
        os._exit(0)
    os.nice(_NICE)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out all the same, this goes before the server
    taken = 0
    with suppress(OSError), open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    with suppress(ValueError, OSError):
        if taken:
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _Limited:
    """Ends the process if what is inside takes more processor time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar.

    Attributes:
      start: the matcher at the beginning of every answer.
      opens, canonical, numbers: the arguments of `Answer`.
    """

    start: LLMatcher
    tokens: Tokens
    opens: tuple[str, ...] = ()
    canonical: bool = False
    numbers: bool = True

    def answer(self) -> Answer:
        """A new answer."""
        return Answer(self.start, self.tokens, self.opens, canonical=self.canonical, numbers=self.numbers)


def _compile(wanted: bytes, tokens: Tokens) -> tuple[Grammar | None, Compiled]:
    """The grammar of a frame, or None and why there is none."""
    if wanted[:1] == CALLS:
        return _compile_calls(msgspec.json.decode(wanted[1:], type=CallGrammar), tokens)
    return _compile_answer(msgspec.json.decode(wanted[1:], type=AnswerShape), tokens)


def _compile_answer(shape: AnswerShape, tokens: Tokens) -> tuple[Grammar | None, Compiled]:
    from llguidance import LLMatcher

    dropped = list[str]()
    try:
        if shape.kind == "json":
            dropped = adapt(shape.wanted)
            options: JsonCompileOptions = {"whitespace_pattern": _WHITESPACE, "lenient": True}
            text = LLMatcher.grammar_from_json_schema(msgspec.json.encode(shape.wanted).decode(), overrides=options)
        else:
            text = LLMatcher.grammar_from_lark(lark_of(shape))
    except ValueError as error:
        return None, Compiled(error=explained(str(error)))
    return _begin(text, dropped, tokens, numbers=shape.kind == "json")


def _compile_calls(calls: CallGrammar, tokens: Tokens) -> tuple[Grammar | None, Compiled]:
    shapes = [AnswerShape(wanted=dict(call.schema), field=call.field) for call in calls.calls]
    dropped, texts = list[str](), list[str]()
    own: str | None = None  # the grammar of an answer that is no JSON
    if calls.answer is not None:
        shapes.append(calls.answer)
    numbers = calls.answer is None or calls.answer.kind == "json"
    try:
        for shape in shapes:
            if shape.kind == "json":
                dropped += adapt(shape.wanted)
                texts.append("%json " + msgspec.json.encode({**shape.wanted, "x-guidance": _COMPACT}).decode())
            else:
                own = lark_of(shape)
                texts.append("@answer")
        answer = texts.pop() if calls.answer is not None else None
        grammars = [{"lark_grammar": lark(calls, texts, answer, tokens.controls)}]
        if own is not None:
            grammars.append({"name": "answer", "lark_grammar": own})
        text = msgspec.json.encode({"grammars": grammars}).decode()
        grammar, compiled = _begin(text, dropped, tokens, calls, numbers=numbers)
    except ValueError as error:
        grammar, compiled = None, Compiled(error=explained(str(error)))
    if compiled.error:
        for shape in shapes:  # which of them it is
            alone = _compile_answer(shape, tokens)[1]
            if alone.error:
                return None, Compiled(error=alone.error, field=shape.field)
    return grammar, compiled


def _begin(
    grammar: str, dropped: list[str], tokens: Tokens, calls: CallGrammar | None = None, *, numbers: bool
) -> tuple[Grammar | None, Compiled]:
    from llguidance import LLMatcher, LLParserLimits

    try:
        limits = LLParserLimits(max_items_in_row=_ROW_ITEMS, verbose_errors=False)
        start = LLMatcher(tokens.known, grammar, log_level=0, limits=limits)
    except ValueError as error:
        return None, Compiled(error=explained(str(error)))
    # A call that comes back in the conversation is then the tokens that were drawn, as far as the grammar spelled it.
    opens = () if calls is None else calls.opens
    made = Grammar(start, tokens, opens, canonical=calls is not None, numbers=numbers)
    complaint = start.get_error() or _try(made)
    if complaint:
        return None, Compiled(error=explained(complaint))
    return made, Compiled(ignored=not_enforced(dropped, start.get_grammar_warnings()))


def _try(grammar: Grammar) -> str:
    """Answers at random; says what stood in the way: a schema that allows nothing, or too much, says so here."""
    draws = random.Random(0)
    for _ in range(_WALKS):
        answer = grammar.answer()
        token = None
        for _ in range(_WALK):
            verdict = answer.take(token)
            if verdict == FAILED:
                return answer.error
            if verdict != MAY_GO_ON:
                break
            allowed = np.flatnonzero(np.unpackbits(answer.mask, bitorder="little"))
            token = int(draws.choice(allowed))
    return ""


def _serve(orders: socket.socket, grammar: Grammar) -> None:
    """Goes on with answers, each on a socket of its own, until the parent closes that of the orders."""
    answers: dict[int, tuple[socket.socket, Answer]] = {}
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == orders.fileno():
                order, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
                if not order:
                    return
                for given in descriptors:
                    answers[given] = socket.socket(fileno=given), grammar.answer()
                    poll.register(given, select.POLLIN)
                continue
            asker, answer = answers[descriptor]
            if not _go_on(asker, answer, len(grammar.tokens.texts)):
                poll.unregister(descriptor)
                del answers[descriptor]
                asker.close()


def _go_on(asker: socket.socket, answer: Answer, tokens: int) -> bool:
    """Takes one token and says what may follow; False once nobody listens any more."""
    try:
        data = _exactly(asker, TOKEN.size)
        if data is None:
            return False
        (token,) = TOKEN.unpack(data)
        with _Limited(_STEP_SECONDS):
            verdict = answer.take(None if token == BEGIN else token)
        payload = explained(answer.error).encode() if verdict == FAILED else answer.mask.tobytes()
        size = verdict_bytes(tokens)
        asker.sendall((VERDICT.pack(verdict) + payload)[:size].ljust(size, b"\0"))
    except OSError:
        return False
    return True


def _frame_from(source: socket.socket) -> bytes | None:
    length = _exactly(source, LENGTH.size)
    return None if length is None else _exactly(source, LENGTH.unpack(length)[0])


def _exactly(source: socket.socket, size: int) -> bytes | None:
    """So many bytes, or None if the other end closes before."""
    data = bytearray()
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
