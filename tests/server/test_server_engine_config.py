"""What the engine is opened with: one name from the command line to `EngineConfig`, one range, one default."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.config import ConfigError
from atlas_jax.engine.config import FIELDS, EngineConfig
from server.config.settings import Settings, SettingsError
from server.config.sources import load, options
from server.engine_factory import SETTING_OF, engine_config, engine_factory

ROOT = Path(__file__).parents[2]
OTHERS: dict[str, Any] = {
    "model_path": "other.gguf",
    "hf_repo": "org/other:Q8_0",
    "offline": True,
    "adapter_path": "other.safetensors",
    "memory_enabled": False,
    "memory_path": "elsewhere",
    "memory_file": "other.atlas",
    "session_store": "s3://bucket/prefix",
    "session_store_endpoint": "http://127.0.0.1:8333",
    "journal_sync": 0.25,
    "cache_path": "cache",
    "threads": 3,
    "max_concurrent": 5,
    "max_waiting": 7,
    "max_context": 4096,
    "max_window": 1024,
    "memory_dim": 64,
    "memory_budget": 20_000_000,
    "calibration_seconds": 12.5,
    "calibrate_in_background": False,
    "l1_cache_size": 11,
    "l2_cache_size": 13,
    "l3_cache_size": 17,
    "owner_quota": 19,
    "prefix_cache_size": 23,
    "lora": ("a.gguf=0.5", "b.gguf"),
    "weight_dtype": "float32",
    "kv_dtype": "float32",
    "speculate": False,
    "pooling": "last",
    "native_kernels": False,
    "gpu_kernels": True,
    "mesh_data": 2,
    "mesh_model": 4,
    "distributed": True,
    "coordinator_address": "host0:8476",
    "num_processes": 4,
    "process_id": 3,
}


def test_the_defaults_are_the_engines_own() -> None:
    config = engine_config(load(environ={"ATLAS_MODEL": "m.gguf"}))
    # a program that opens an engine wants its memory; clients of a server want answers
    assert config == EngineConfig(model_path="m.gguf", memory_path="./atlas_memory", calibrate_in_background=True)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_can_be_set_from_outside(field: str) -> None:
    option = next(option for option in options() if option.path[-1] == SETTING_OF.get(field, field))
    value = OTHERS[field]
    text = (
        ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )
    before = engine_config(load(environ={"ATLAS_MODEL": "m.gguf"}))
    # a model is a file or a repository
    model, no_file = ({}, {"model_path": None}) if field == "hf_repo" else ({"ATLAS_MODEL": "m.gguf"}, {})
    after = engine_config(load(environ={**model, option.env: text}))
    assert after == dataclasses.replace(before, **{**no_file, field: value})
    assert after != before


def test_a_budget_arrives_by_flag_variable_and_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"atlas": {"memory_budget": 0}}')
    model = {"ATLAS_MODEL": "m.gguf"}
    for settings in (
        load(environ=model, flags={"atlas.memory_budget": "0"}),
        load(environ={**model, "ATLAS_MEMORY_BUDGET": "0"}),
        load(environ=model, config=str(file)),
    ):
        assert engine_config(settings).memory_budget == 0
        assert settings.atlas.default_config.memory_budget is None, "the server's, whatever that is"
    assert load(environ={"ATLAS_DEFAULT_MEMORY_BUDGET": "7"}).atlas.default_config.memory_budget == 7


def test_a_server_that_keeps_nothing_has_no_folder() -> None:
    assert engine_config(load(environ={"ATLAS_MODEL": "m", "ATLAS_MEMORY_PERSIST": "0"})).memory_path is None


def test_with_keys_an_owner_gets_half_of_the_disk() -> None:
    environ = {"ATLAS_MODEL": "m", "ATLAS_API_KEYS_FILE": "keys", "ATLAS_L3_CACHE_SIZE": "1000"}
    assert engine_config(load(environ=environ)).owner_quota == 500
    assert engine_config(load(environ={**environ, "ATLAS_OWNER_QUOTA": "9"})).owner_quota == 9


def test_a_server_without_a_model_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(SettingsError, match="--model"):
        engine_factory(Settings())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_concurrent", 0),
        ("max_concurrent", 4097),
        ("max_concurrent", "8"),
        ("max_concurrent", True),
        ("max_waiting", -1),
        ("max_context", 127),
        ("max_window", 1000),
        ("max_window", 0),
        ("threads", -1),
        ("journal_sync", float("nan")),
        ("journal_sync", -0.5),
        ("l1_cache_size", -1),
        ("l2_cache_size", 1.5),
        ("owner_quota", -1),
        ("memory_budget", -1),
        ("memory_budget", 1.5),
        ("memory_budget", (1 << 40) + 1),
        ("weight_dtype", "bfloat16"),
        ("kv_dtype", None),
        ("speculate", 1),
        ("pooling", "max"),
        ("mesh_data", 0),
        ("mesh_data", 33),
        ("coordinator_address", "host0"),
        ("coordinator_address", ":8476"),
        ("coordinator_address", "host0:65536"),
        ("coordinator_address", "host0:²"),
        ("num_processes", 0),
        ("process_id", -1),
        ("memory_file", "../x"),
        ("memory_path", 3),
        ("session_store", "ftp://host/x"),
        ("session_store", "s3:///x"),
        ("session_store_endpoint", "host:80"),
        ("model_path", None),
        ("hf_repo", "org/other"),
        ("hf_repo", 7),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        EngineConfig(**{"model_path": "m.gguf", field: value})


def test_a_process_is_one_of_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"process_id \(2\) must be less than num_processes, 2"):
        EngineConfig(model_path="m.gguf", num_processes=2, process_id=2)
    assert EngineConfig(model_path="m.gguf", num_processes=2).several_processes
    assert not EngineConfig(model_path="m.gguf").several_processes


def test_a_model_is_a_file_or_a_repository() -> None:
    assert engine_config(load(environ={"ATLAS_HF_REPO": "org/name", "ATLAS_MODEL": ""})).hf_repo == "org/name"
    assert engine_config(load(environ={"ATLAS_HF_REPO": "", "ATLAS_MODEL": "m.gguf"})).model_path == "m.gguf"
    with pytest.raises(SettingsError, match=r"server.model and server.hf_repo both name a model"):
        engine_config(load(environ={"ATLAS_HF_REPO": "org/name", "ATLAS_MODEL": "m.gguf"}))
    with pytest.raises(SettingsError, match=r"hf_repo: 'name' is no repository: expected org/name"):
        engine_config(load(environ={"ATLAS_HF_REPO": "name"}))


def test_what_only_the_engine_can_tell_is_an_error_of_the_settings_too() -> None:
    with pytest.raises(SettingsError, match="mesh_data"):
        engine_config(load(environ={"ATLAS_MODEL": "m", "ATLAS_MESH_DATA": "64"}))
    with pytest.raises(SettingsError, match="multiple of 128"):
        load(environ={"ATLAS_MAX_WINDOW": "1000"})


def test_settings_and_the_engines_interface_are_read_without_jax() -> None:
    code = "import sys, server.cli, atlas_jax.engine.api; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
