"""Fields that a person sets are those of the server's requests, with its ranges and its words."""

from __future__ import annotations

import pytest

from server.schemas.atlas import AtlasDefaults
from server.terminal.arguments import UsageError
from server.terminal.fields import RequestFields, assignments


def test_values_are_json_or_else_text_and_null_takes_one_back() -> None:
    fields = assignments(["temperature=0.2", "stop=END", 'stop=["a","b"]', "atlas.use_muon=true", "window_size=256"])
    assert fields.request() == {"temperature": 0.2, "stop": ["a", "b"]}
    assert fields.atlas() == {"use_muon": True, "window_size": 256}
    assert fields.set("temperature", "null") == "temperature"
    assert fields.request() == {"stop": ["a", "b"]}


def test_every_field_of_the_atlas_object_can_be_set() -> None:
    assert {f"atlas.{name}" for name in AtlasDefaults.__struct_fields__} <= set(RequestFields.names())
    assert not {"atlas.session_id", "atlas.regenerate", "stream", "n", "model"} & set(RequestFields.names())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", "101", "temperature: value must be between 0 and 100"),
        ("temperature", "hot", "temperature: "),
        ("atlas.memory_layers", "11", "atlas.memory_layers: value must be between 1 and 10"),
        ("blend", "1", "there is no field 'blend'; did you mean blend_ratio?"),
        ("stream", "true", "there is no field 'stream'"),
    ],
)
def test_what_the_server_would_refuse_is_refused(name: str, value: str, said: str) -> None:
    fields = RequestFields()
    with pytest.raises(UsageError) as caught:
        fields.set(name, value)
    assert str(caught.value).startswith(said)
    assert fields.values == {}
