"""The fields of the `atlas` object: one schema for requests, defaults, run-time changes, the engine and the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from atlas_jax.engine.api import MemoryParams
from atlas_jax.engine.memory_options import MemoryOptions
from server.config.settings import AtlasSection
from server.config.sources import SettingsError, load, options
from server.errors import BadRequest
from server.schemas.atlas import AtlasDefaults, AtlasOptions
from server.schemas.runtime_config import CHANGEABLE, ConfigChange, RuntimeValues
from server.validation import parse
from tools import write_settings

ROOT = Path(__file__).parents[2]
DEFAULTS = msgspec.to_builtins(AtlasDefaults())


def schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    (_,), components = msgspec.json.schema_components([kind])
    properties: dict[str, Any] = components[kind.__name__]["properties"]
    return properties


def bounds() -> list[tuple[str, Any, Any]]:
    """Every field with a bound, the nearest value inside it and the nearest outside."""
    found = []
    for name, shape in schema(AtlasDefaults).items():
        number = next((one for one in shape.get("anyOf", [shape]) if one.get("type") in ("integer", "number")), {})
        least = 1 if number.get("type") == "integer" else 1e-6
        for bound, inside, outside in (
            ("minimum", 0, -1),
            ("maximum", 0, 1),
            ("exclusiveMinimum", 1, 0),
            ("exclusiveMaximum", -1, 0),
        ):
            if bound in number and name != "window_size":
                found.append((name, number[bound] + inside * least, number[bound] + outside * least))
    return found


def test_all_forms_have_the_same_fields() -> None:
    fields = set(AtlasDefaults.__struct_fields__)
    assert set(AtlasOptions.__struct_fields__) == fields | {"session_id", "regenerate", "token_gates", "memory_dim"}
    assert (
        set(ConfigChange.__struct_fields__)
        == set(RuntimeValues.__struct_fields__)
        == fields | {*CHANGEABLE, "memory_dim"}
    )
    assert fields - set(MemoryParams.__struct_fields__) == {"enabled", "batch_size"}
    assert set(CHANGEABLE) <= set(AtlasSection.__struct_fields__)


def test_the_engines_defaults_are_the_servers() -> None:
    params = msgspec.structs.asdict(MemoryParams())
    assert {name: params[name] for name in MemoryOptions.__struct_fields__}.items() <= DEFAULTS.items()


def test_absent_and_null_say_nothing() -> None:
    nothing = AtlasOptions()
    assert parse(AtlasOptions, {}) == parse(AtlasOptions, dict.fromkeys(AtlasOptions.__struct_fields__)) == nothing
    assert set(msgspec.structs.asdict(nothing).values()) == {None}


def test_every_field_says_what_it_does() -> None:
    for kind in (AtlasDefaults, AtlasOptions, ConfigChange, RuntimeValues):
        for name, shape in schema(kind).items():
            assert "description" in shape or any("description" in one for one in shape["anyOf"]), (kind, name)


@pytest.mark.parametrize(("name", "inside", "outside"), bounds())
def test_every_form_has_the_same_range(name: str, inside: Any, outside: Any) -> None:
    for kind in (AtlasDefaults, AtlasOptions, ConfigChange):
        assert getattr(parse(kind, {name: inside}), name) == inside
        with pytest.raises(BadRequest, match=name):
            parse(kind, {name: outside})
    variable = next(option.env for option in options() if option.path == ("atlas", "default_config", name))
    with pytest.raises(SettingsError, match=name):
        load(environ={variable: str(outside)})


def test_bounds_are_found() -> None:
    assert {name for name, *_ in bounds()} >= {"blend_ratio", "memory_layers", "learning_rate", "batch_size"}


def test_the_documents_table_is_the_schema() -> None:
    text = (ROOT / "docs" / "README-atlas.md").read_text("utf-8")
    assert write_settings.with_table(text) == text, "run `make config` and commit docs/README-atlas.md"
