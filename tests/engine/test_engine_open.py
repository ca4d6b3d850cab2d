"""Opening an engine by a configuration, by keywords, and by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atlas_jax.config import ConfigError
from atlas_jax.engine import Engine, EngineConfig


def test_keywords_replace_fields_of_the_configuration(tmp_path: Path) -> None:
    config = EngineConfig(model_path=tmp_path / "one.gguf", cache_path=tmp_path)
    for given, fields, missing in (
        (config, {}, "one.gguf"),
        (config, {"model_path": tmp_path / "other.gguf"}, "other.gguf"),
        (None, {"model_path": tmp_path / "third.gguf", "cache_path": tmp_path}, "third.gguf"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            Engine.open(given, **fields)
        assert Path(caught.value.filename).name == missing


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"max_running": 2}, TypeError, "max_running"),
        ({"max_concurrent": 0}, ConfigError, "max_concurrent"),
        ({"max_concurrent": 2, "mesh_data": 4}, ConfigError, "mesh_data"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_opened(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        Engine.open(model_path=tmp_path / "missing.gguf", **fields)
