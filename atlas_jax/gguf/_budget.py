"""What one rendering of a template may cost: processor time, and the size of what it makes.

Python cannot be interrupted inside one operation on large values, so every value a template makes is measured when it
is made. Whatever the template then does with it is one operation on a value of bounded size.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import Undefined

MAX_DEPTH = 64
MAX_INTEGER_BITS = 4096
# What an element of a container counts beside its text.
ELEMENT = 32
# Sizes of all values made in one rendering, in multiples of the largest value allowed.
_WORK_FACTOR = 16


class TemplateError(ValueError):
    """A chat template that is wrong, fails on these messages, refuses them, or takes more than it may."""


class _Collector(threading.local):
    """Processor time that the garbage collector took of a thread.

    A full collection runs in whatever thread makes the object that sets it off: a second and more in a large process
    (measured: 1.01 s), which is not the template's doing.
    """

    spent = 0.0
    since = 0.0

    def watch(self, phase: str, _: Mapping[str, int]) -> None:
        now = time.thread_time()
        if phase == "start":
            self.since = now
        else:
            self.spent += now - self.since


_COLLECTOR = _Collector()
gc.callbacks.append(_COLLECTOR.watch)


def _own_time() -> float:
    """Processor time of this thread's own work: a template cannot sleep, and a busy machine is not its fault."""
    return time.thread_time() - _COLLECTOR.spent


class Own(str):
    """A text that a template spelled itself: nothing of it comes from the messages."""

    __slots__ = ()


class Budget:
    """Limits of one rendering.

    Attributes:
      size_limit: characters of the largest string, or elements × 32 + characters of the largest container.
      max_items: elements of the largest list.
      mark: puts characters in place of the control tokens in a text of the template's own; None when rendering to text.
    """

    __slots__ = ("_deadline", "_time_limit", "_weights", "_work_left", "mark", "max_items", "size_limit")

    def __init__(self, time_limit: float, size_limit: int, mark: Callable[[str], str] | None = None) -> None:
        self.size_limit = size_limit
        self.max_items = size_limit // ELEMENT
        self.mark = mark
        self._time_limit = time_limit
        self._deadline = _own_time() + time_limit
        self._work_left = size_limit * _WORK_FACTOR
        self._weights: dict[int, tuple[object, int, int]] = {}

    def tick(self) -> None:
        """Ends the rendering if its time is over."""
        if _own_time() > self._deadline:
            raise TemplateError(f"chat template took more than {self._time_limit:g} s")

    def check(self, size: int) -> None:
        """Ends the rendering if a value of this size may not be made."""
        if size > self.size_limit:
            raise TemplateError(f"chat template made a value larger than {self.size_limit} characters")

    def spend(self, size: int) -> None:
        """Counts a value that is made."""
        self.check(size)
        self._work_left -= size
        if self._work_left < 0:
            raise TemplateError(f"chat template made more than {self.size_limit * _WORK_FACTOR} characters in all")

    def admit(self, value: Any) -> Any:
        """Measures a value that was made and returns it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise TemplateError(f"chat template made an integer of more than {MAX_INTEGER_BITS} bits")
        elif isinstance(value, (list, tuple, dict)):
            self.spend(ELEMENT * len(value))
            self._weigh(value, 0)
        elif isinstance(value, Iterator):
            return self.admit(self._collect(value))
        return value

    def measure(self, value: Any) -> tuple[int, int]:
        """Size and depth of a value that a template holds."""
        if isinstance(value, (list, tuple, dict)):
            return self._weigh(value, 0)
        return (len(value) if isinstance(value, str) else ELEMENT), 0

    def _collect(self, values: Iterator[Any]) -> list[Any]:
        result = []
        for value in values:
            self.tick()
            result.append(value)
            if len(result) > self.max_items:
                raise TemplateError(f"chat template made a list of more than {self.max_items} elements")
        return result

    def _weigh(self, value: Any, level: int) -> tuple[int, int]:
        """Size and depth of a container, shared parts counted as often as they appear."""
        known = self._weights.get(id(value))
        if known is not None and known[0] is value:
            return known[1], known[2]
        if level > MAX_DEPTH:
            raise TemplateError(f"chat template values are nested more than {MAX_DEPTH} deep")
        size, depth = ELEMENT * len(value), 1
        for child in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            if isinstance(child, str):
                size += len(child)
            elif isinstance(child, (list, tuple, dict)):
                inner_size, inner_depth = self._weigh(child, level + 1)
                size += inner_size
                depth = max(depth, inner_depth + 1)
            elif child is not None and not isinstance(child, (int, float, range, Undefined)):
                raise TemplateError(f"chat template put a {type(child).__name__} into a container")
        self.check(size)
        if depth > MAX_DEPTH:
            raise TemplateError(f"chat template values are nested more than {MAX_DEPTH} deep")
        # The value is kept, so that its identity stays its own.
        self._weights[id(value)] = (value, size, depth)
        return size, depth


_CURRENT: ContextVar[Budget] = ContextVar("template budget")


def current() -> Budget:
    """The budget of the rendering that this code is part of."""
    return _CURRENT.get()


@contextmanager
def spending(budget: Budget) -> Iterator[Budget]:
    """Makes a budget the current one."""
    token = _CURRENT.set(budget)
    try:
        yield budget
    finally:
        _CURRENT.reset(token)


# Names that may become part of a control token, although clients write them.
_ROLES = frozenset({"assistant", "developer", "environment", "function", "ipython", "model", "observation", "system"})
_ROLES |= {"tool", "user"}


def is_own(value: Any) -> bool:
    """Whether a value is text that no client wrote, but for the names of roles; numbers could be a client's."""
    if isinstance(value, str):
        return isinstance(value, Own) or value in _ROLES or not value
    return value is None or isinstance(value, bool | Undefined)


def made_of(result: Any, operands: Iterable[Any]) -> Any:
    """What was made of some operands: if all of them are the template's own, so is every text of it."""
    mark = current().mark
    if mark is None or not isinstance(result, str | list) or not all(map(is_own, operands)):
        return result
    if isinstance(result, str):
        return Own(mark(result))
    return [Own(mark(one)) if isinstance(one, str) else one for one in result]


def text(value: Any) -> str:
    """A value as a template prints it."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (int, float, list, tuple, dict, range, Undefined)):
        return str(value)
    return f"<{type(value).__name__}>"
