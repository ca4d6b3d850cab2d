"""What an evaluation consists of: tasks, the items of a task, and the values that come out of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from atlas_jax.engine.api import Tokenizer
    from atlas_jax.evaluation.arms import Arm
    from atlas_jax.evaluation.bench import Bench
    from atlas_jax.evaluation.tables import Table
    from atlas_jax.evaluation.texts import Texts

Part = Literal["loss", "recall", "harm", "cost"]
Scale = Literal["quick", "standard", "long"]
Label = str | int


class NotPossible(Exception):
    """An arm that cannot do an item; the message says why, and takes the place of its values."""


@dataclass(frozen=True)
class Item:
    """A document, a context or a set of questions: what one unit of work is about.

    Attributes:
      seed: of what was drawn to make it; 0 where nothing was.
      data: all that the values depend on, texts included; dataclasses and what JSON has. The unit's key is a digest of it.
    """

    name: str
    seed: int
    data: Any


@dataclass(frozen=True)
class Value:
    """One figure of one unit.

    Attributes:
      measure: what it is, e.g. "nats" or "found".
      value: for a share 0 or 1.
      labels: what tells it apart from the unit's other values of this measure: the wording, the distance, the position.
      weight: tokens (or whatever it is a mean of) behind it.
      wanted, answer: for people who look at what was said.
    """

    measure: str
    value: float
    labels: Mapping[str, Label] = field(default_factory=dict)
    weight: float = 1.0
    wanted: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Result:
    """A value, and whose it is."""

    arm: str
    item: str
    seed: int
    value: Value


@dataclass(frozen=True)
class Setup:
    """What the items of a task are made of.

    Attributes:
      context: the model's trained context in tokens.
      seeds: how many draws of each sampled item.
    """

    tokenizer: Tokenizer
    texts: Texts
    context: int
    scale: Scale
    seeds: int = 1

    @property
    def quick(self) -> bool:
        """Whether minutes are all there is."""
        return self.scale == "quick"

    @property
    def long(self) -> bool:
        """Whether texts longer than any trained context are wanted."""
        return self.scale == "long"

    def count(self, text: str) -> int:
        """Tokens of a text within another."""
        return len(self.tokenizer.encode(text, add_special=False, parse_special=False))

    def pick(self, *, quick: int, standard: int) -> int:
        """How many of something this scale takes."""
        return quick if self.quick else standard


@dataclass(frozen=True)
class Task:
    """One thing that is measured.

    Attributes:
      about: one or two sentences for the report.
      items: the same setup gives the same items.
      run: the values of one arm for one item. Raises NotPossible.
      tables: what the report says of all results of the task; the arms in their order.
      version: raised when `run` changes what it gives for the same item, so that earlier results no longer count.
      scales: at which it takes part.
      text: the longest text in tokens an item needs, for the engine's sizes.
    """

    name: str
    part: Part
    about: str
    items: Callable[[Setup], Sequence[Item]]
    run: Callable[[Bench, Arm, Item], Sequence[Value]]
    tables: Callable[[Sequence[Result], Sequence[str]], Sequence[Table]]
    version: int = 1
    scales: tuple[Scale, ...] = ("quick", "standard", "long")


def labelled(values: Sequence[Value], **labels: Label) -> list[Value]:
    """The same values with further labels."""
    return [dataclasses.replace(value, labels={**value.labels, **labels}) for value in values]
