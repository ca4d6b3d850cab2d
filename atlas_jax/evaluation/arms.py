"""Arms: the ways of remembering that are compared, each a name and the memory options of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from atlas_jax.config import PAGE
from atlas_jax.engine.api import MemoryParams, SessionKey
from atlas_jax.engine.memory_options import MemoryOptions

Kind = Literal["options", "larger window", "full", "nearest neighbours"]
WINDOW, LARGER, MEMORY, FULL, NEAREST = "window", "larger window", "memory", "full", "nearest neighbours"
_ROOM = 4 * PAGE
"""Tokens that a full window is larger than the text: for a question and its answer."""
_OFF: dict[str, Any] = {"read": False, "write": False, "kept_pairs": 0}


class ArmError(Exception):
    """An arm that cannot be; the message names the option."""


@dataclass(frozen=True)
class Arm:
    """One way of remembering.

    Attributes:
      options: of its requests; those of the full arm say what a window of all the text does.
      kind: a larger window gets its size once it is known how many bytes the memory takes; a full one has that of each
        text; nearest neighbours are computed beside the engine (`nearest`), and know only losses.
    """

    name: str
    options: MemoryOptions
    kind: Kind = "options"

    @property
    def key(self) -> dict[str, Any]:
        """What its values depend on."""
        return {"kind": self.kind, **_plain(self.options)}

    @property
    def attended(self) -> int:
        """Tokens that a token attends in the end: those of the window, and what is kept beside it."""
        return self.options.window_size + (self.options.kept_pairs or 0)

    def params(self, tokens: int, *, session: SessionKey | None = None, teach: bool = True) -> MemoryParams:
        """The options of a request.

        Args:
          tokens: of all that is read before the last answer; the window of the full arm holds them.
          teach: whether a session goes on with this request, or finds itself as it was; nothing without a session.
        """
        given = _plain(self.options)
        if self.kind == FULL:
            given["window_size"] = -(-(tokens + _ROOM) // PAGE) * PAGE
        if session is not None:
            given["write"] = teach
        return MemoryParams(**given, session=session)


def window_alone(**options: Any) -> MemoryOptions:
    """Options of an exact window and nothing else."""
    return MemoryOptions(**_OFF, **options)


def standard_arms() -> list[Arm]:
    """The arms every evaluation has, from what attends least to what attends all."""
    return [
        Arm(WINDOW, window_alone()),
        Arm(LARGER, window_alone(), kind="larger window"),
        Arm(MEMORY, MemoryOptions()),
        Arm(FULL, window_alone(), kind="full"),
        Arm(NEAREST, window_alone(), kind="nearest neighbours"),
    ]


def parse_arm(text: str) -> Arm:
    """An arm from `NAME=JSON`, the JSON being memory options of an `atlas` object; others have their defaults.

    Raises:
      ArmError: it is not of that form; the message names the option at fault.
    """
    name, equals, given = text.partition("=")
    name = name.strip()
    if not name or not equals:
        raise ArmError(f'arm {text!r}: write NAME=JSON, for example half={{"window_size": 256}}')
    try:
        options = msgspec.json.decode(given.encode(), type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ArmError(f"arm '{name}': the options are not a JSON object ({error})") from None
    known = MemoryOptions.__struct_fields__
    for field in options:
        if field not in known:
            raise ArmError(f"arm '{name}': {field} is no memory option (there are {', '.join(known)})")
    for field, value in options.items():  # one by one, so that the message names the field
        try:
            msgspec.convert({field: value}, MemoryOptions)
        except msgspec.ValidationError as error:
            raise ArmError(f"arm '{name}': {field} is {value!r}: {error}") from None
    return Arm(name, msgspec.convert(options, MemoryOptions))


def chosen_arms(names: Sequence[str], further: Sequence[str], *, left_out: Sequence[str] = ()) -> list[Arm]:
    """The standard arms of these names, or all but those left out, then the further ones.

    Raises:
      ArmError: a name is not known or there twice, or a further arm is wrong.
    """
    standard = {arm.name: arm for arm in standard_arms()}
    for name in names:
        if name not in standard:
            raise ArmError(f"there is no arm '{name}' (there are {', '.join(standard)}; --arm NAME=JSON makes others)")
    wanted = names or standard.keys() - set(left_out)
    arms = [arm for name, arm in standard.items() if name in wanted] + [parse_arm(one) for one in further]
    seen = set[str]()
    for arm in arms:
        if arm.name in seen:
            raise ArmError(f"there are two arms '{arm.name}'")
        seen.add(arm.name)
    return arms


def _plain(options: MemoryOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in MemoryOptions.__struct_fields__}
