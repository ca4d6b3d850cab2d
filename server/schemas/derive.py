"""Structs made from the fields of others, so that a field's type, range and description are written once."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterable
from typing import Any, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, UNSET, UnsetType

Field = tuple[str, Any, Any]
"""Name, annotation and default; `NODEFAULT` is required."""


def fields_of(struct: type[msgspec.Struct], names: Collection[str] | None = None) -> list[Field]:
    """The fields of a struct, or those of these names."""
    hints = typing.get_type_hints(struct, include_extras=True)
    return [
        (field.name, hints[field.name], field.default)
        for field in msgspec.structs.fields(struct)
        if names is None or field.name in names
    ]


def required(fields: Iterable[Field]) -> list[Field]:
    """The same without defaults."""
    return [(name, kind, NODEFAULT) for name, kind, _ in fields]


def nullable(fields: Iterable[Field]) -> list[Field]:
    """The same, where null and absent say nothing."""
    return [(name, kind if takes_null(kind) else kind | None, None) for name, kind, _ in fields]


def changeable(fields: Iterable[Field]) -> list[Field]:
    """The same, where absent says nothing, and null neither unless it is a value."""
    return [
        (name, kind | UnsetType, UNSET) if takes_null(kind) else (name, kind | None, None) for name, kind, _ in fields
    ]


def struct_of(name: str, fields: Iterable[Field], *, module: str, doc: str) -> type[msgspec.Struct]:
    """A frozen struct of these fields that takes no others; `module` is the one it belongs to."""
    return msgspec.defstruct(
        name,
        [(field, kind) if default is NODEFAULT else (field, kind, default) for field, kind, default in fields],
        module=module,
        namespace={"__doc__": doc},
        kw_only=True,
        frozen=True,
        forbid_unknown_fields=True,
    )


def takes_null(annotation: Any) -> bool:
    """Whether None is a value of the type."""
    if get_origin(annotation) is typing.Annotated:
        return takes_null(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return any(takes_null(member) for member in get_args(annotation))
    return annotation is type(None)
