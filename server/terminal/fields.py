"""The fields of a request that a person may set, checked by the schemas of the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from server.config.sources import suggestion
from server.errors import BadRequest
from server.schemas.atlas import AtlasOptions
from server.schemas.chat import ChatRequest
from server.schemas.sampling import SamplingFields
from server.terminal.arguments import UsageError
from server.validation import parse

_ATLAS = "atlas."
# What a conversation decides by itself, or what would make another kind of answer.
_NOT_SET = ("model", "n", "stream", "stream_options", "user", "n_predict", "atlas", "cache_prompt")
_MORE = ("response_format", "chat_template_kwargs")
_SAMPLING = tuple(name for name in SamplingFields.__struct_fields__ if name not in _NOT_SET) + _MORE
_MEMORY = tuple(name for name in AtlasOptions.__struct_fields__ if name not in ("session_id", "regenerate"))


class RequestFields:
    """What requests say beside their messages: sampling, and under `atlas.` the memory."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        """Some that were checked before, by their dotted names."""
        self._values: dict[str, Any] = dict(values or {})

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(sorted(self._values.items()))

    @property
    def values(self) -> dict[str, Any]:
        """All that are set, by their dotted names."""
        return dict(self._values)

    @staticmethod
    def names() -> tuple[str, ...]:
        """Every name that can be set."""
        return (*_SAMPLING, *(_ATLAS + name for name in _MEMORY))

    def set(self, name: str, text: str) -> str:
        """Sets a field to JSON, or else to the text itself; `null` takes it back. Returns its whole name.

        Raises:
          UsageError: there is no such field, or the server would refuse the value; the message says why.
        """
        whole = self._whole(name)
        try:
            value = msgspec.json.decode(text)
        except msgspec.DecodeError:
            value = text
        if value is None:
            self._values.pop(whole, None)
            return whole
        short = whole.removeprefix(_ATLAS)
        body = {"atlas": {short: value}} if whole.startswith(_ATLAS) else {short: value}
        try:
            parse(ChatRequest, {"messages": [{"role": "user", "content": ""}], **body})
        except BadRequest as error:
            raise UsageError(f"{whole}: {str(error).partition(': ')[2] or error}") from None
        self._values[whole] = value
        return whole

    def request(self) -> dict[str, Any]:
        """The part of a request's body that they are, without the memory's."""
        return {name: value for name, value in self._values.items() if not name.startswith(_ATLAS)}

    def atlas(self) -> dict[str, Any]:
        """The memory's part."""
        return {name.removeprefix(_ATLAS): value for name, value in self._values.items() if name.startswith(_ATLAS)}

    @staticmethod
    def _whole(name: str) -> str:
        known = RequestFields.names()
        if name in known:
            return name
        if _ATLAS + name in known:
            return _ATLAS + name
        begun = [one for one in (*known, *_MEMORY) if one.startswith(name)]
        near = f"; did you mean {begun[0]}?" if len(name) > 2 and begun else suggestion(name, [*known, *_MEMORY])
        raise UsageError(f"there is no field '{name}'{near}")


def assignments(given: list[str]) -> RequestFields:
    """The fields of flags `--set NAME=VALUE`; raises UsageError."""
    fields = RequestFields()
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise UsageError(f"--set wants NAME=VALUE, got '{one}'")
        fields.set(name.strip(), value.strip())
    return fields
