"""What comes of an answer that arrives in pieces, put together again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from server.tool_calls.answer import AnswerReader
from server.tool_calls.channels import ChannelReader
from server.tool_calls.pieces import CallArguments, CallBegun, Content, Piece, Reasoning
from server.tool_calls.reader import CallReader
from server.tool_calls.reasoning import ReasoningReader
from server.tool_calls.style import Style

NAMES = ("get_weather", "get", "send.mail")


@dataclass
class Read:
    """An answer.

    Attributes:
      deltas: the pieces of each call's arguments.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    deltas: list[list[str]] = field(default_factory=list)

    def add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            match piece:
                case Content(text):
                    assert text
                    self.content += text
                case Reasoning(text):
                    assert text
                    self.reasoning += text
                case CallBegun(index, id_, name):
                    assert index == len(self.calls)
                    self.calls.append((name, ""))
                    self.ids.append(id_)
                    self.deltas.append([])
                case CallArguments(index, text):
                    assert index == len(self.calls) - 1
                    assert text
                    name, so_far = self.calls[index]
                    self.calls[index] = name, so_far + text
                    self.deltas[index].append(text)


def read(
    style: Style | None,
    chunks: Sequence[str],
    *,
    exact: bool = False,
    most: int | None = None,
    think: bool | None = None,
    names: Sequence[str] = NAMES,
) -> Read:
    """Reads an answer.

    Args:
      think: None for no reasoning, else whether the template has begun it.
    """
    numbers = itertools.count()
    calls = style and CallReader(style, names, exact=exact, most=most, new_id=lambda: f"call_{next(numbers)}")
    if style is not None and style.channels is not None:
        new_id = lambda: f"call_{next(numbers)}"  # noqa: E731
        reader = AnswerReader(ChannelReader(style, names, exact=exact, most=most, new_id=new_id))
    else:
        reader = AnswerReader(None if think is None else ReasoningReader("<think>", "</think>", begun=think), calls)
    out = Read()
    for chunk in chunks:
        out.add(reader.push(chunk))
    out.add(reader.finish())
    if not exact:
        assert reader.called == bool(out.calls)
    return out
