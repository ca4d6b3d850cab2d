"""An engine on a mesh of eight virtual CPU devices answers as one on one device; a mesh that cannot be is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from atlas_jax import sharding
from atlas_jax.config import ConfigError
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.kv_pages import init_kept_pairs
from atlas_jax.model.loading import model_config
from atlas_jax.sharding import check_mesh
from tests import tiny_model
from tests.patience import PATIENCE


@pytest.mark.parametrize(
    ("dtype", "meshes"),
    [
        ("float32", ["2,2"]),
        pytest.param("float32", ["1,2", "2,1", "1,4", "2,4"], marks=pytest.mark.slow),
    ],
)
def test_a_mesh_answers_as_one_device(tmp_path: Path, dtype: str, meshes: list[str]) -> None:
    assert len(run(str(tmp_path), dtype, *meshes).splitlines()) == len(meshes)


@pytest.mark.slow
def test_no_cache_weight_or_memory_moves_between_devices(tmp_path: Path) -> None:
    assert "collectives" in run("collectives", str(tmp_path))


@pytest.mark.slow
def test_heads_that_have_a_score_without_a_value_are_divided_with_it(tmp_path: Path) -> None:
    assert "gpt-oss" in run("scores", str(tmp_path), "gpt-oss")


def test_all_of_a_kept_pair_lies_on_the_device_of_its_head() -> None:
    """In few bits it is several arrays, and none of them has the name of anything else."""
    pairs = init_kept_pairs(2, 3, 4, 64, "int8")
    for spec in jax.tree.leaves(of_rows(pairs), is_leaf=is_spec):
        assert tuple(spec)[:3] == ("data", None, "model")


def test_every_process_has_all_that_a_host_reads_of_a_step() -> None:
    output = StepOutput(*(jax.ShapeDtypeStruct((2, 1, 4), kind) for kind in (jnp.int32, jnp.float32)))
    for spec in jax.tree.leaves(of_rows(output), is_leaf=is_spec):
        assert not any(spec)


def of_rows(tree: Any) -> Any:
    return sharding._specs({"data": 2, "model": 2}, tree, sharding._ROWS, ("data",))


def is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.engine.runner.eight_devices", *arguments]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("data", "model", "named"),
    [
        (0, 1, "mesh_data must be at least 1"),
        (1, 3, r"mesh_model \(3\) must divide the model's 2 KV heads"),
        (1, 2, r"mesh_model \(2\) must divide the MLP's 3 blocks of 32 columns"),
    ],
)
def test_a_mesh_the_model_does_not_fit_is_refused(
    models: dict[str, tuple[Path, Path]], data: int, model: int, named: str
) -> None:
    with GGUFFile.open(models["llama"][0]) as file:
        config = model_config(file)
    assert config.ff == tiny_model.LLAMA.ff
    with pytest.raises(ConfigError, match=named):
        check_mesh(config, data, model)


@pytest.mark.parametrize(
    ("mesh", "named"),
    [
        ({"mesh_data": 3}, r"mesh_data \(3\) times mesh_model \(1\) must not exceed the number of devices"),
        ({"mesh_data": 8, "max_concurrent": 4}, "mesh_data"),
    ],
)
def test_too_few_devices_are_refused(opened: Callable[..., Any], mesh: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named), opened(**mesh):
        pass
