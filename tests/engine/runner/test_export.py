"""The exported decode step draws what the live one does, and lowers for platforms that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine.api import MemoryParams, SamplingParams
from atlas_jax.engine.runner import export
from atlas_jax.engine.runner.base import Buckets
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from atlas_jax.engine.runner.step import StepConfig, Weights
from atlas_jax.engine.runner.step_inputs import memory_settings, recent_text, sampling_state
from atlas_jax.engine.runner.step_programs import weight_shapes
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels import lowering_platform
from atlas_jax.kernels.speculative_drafter import NONE
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.recall import adapter_store

STEPS = 4


@pytest.fixture(scope="module")
def parts(models: dict[str, tuple[Path, Path]]) -> tuple[StepConfig, Weights]:
    model, adapter = models["llama"]
    with GGUFFile.open(model) as file:
        config, params = model_config(file), load_params(file, model_config(file))
        found = adapter_store.decode(adapter.read_bytes(), file.fingerprint(), config, max_window=2 * PAGE)
    return StepConfig(config, found[0]), Weights(params, found[1], jnp.full((config.vocab,), NONE, jnp.int32))


def test_the_exported_step_draws_what_the_live_one_does(parts: tuple[StepConfig, Weights], tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="needs the extra `export`")
    config, weights = parts
    with lowering_platform.elsewhere("cpu"):
        runner = PretrainedRunner(config, weights, "int8", Buckets(rows=(2,), pages=(4,), max_draft_rows=0))
        for index in range(2):
            row = runner.start_page(runner.new_row(4), PageSchedule(None).next_page(0), None)
            row = [*runner.prefill(row, memory_settings(None, 1, 1), list(range(3, 20 + index)))][-1].row
            sampling = sampling_state(SamplingParams(temperature=0.8), config.model.vocab, 7 + index, [])
            text = recent_text([5], 17 + index)
            settings = memory_settings(MemoryParams(), 1, 1)
            runner.insert(index, row, 5, text, sampling, settings, with_memory=True)
        step = export.DecodeStep.of(config, rows=2, pages=4)
        files = export.write(step, ["cpu"], tmp_path)
        manifest = json.loads((tmp_path / "decode.json").read_text())
        assert len(manifest["arguments"]) == len(jax.tree.leaves(step.arguments))
        exported = jax.export.deserialize(bytearray((tmp_path / "decode-cpu.jax").read_bytes()))
        assert {path.name for path in files} == {"decode.json", "decode-cpu.jax", "decode-cpu.mlir.bc"}
        wanted = np.ones(2, np.int32)
        for _ in range(STEPS):
            state = jax.tree.map(jnp.copy, (runner.sequences, runner.decode_state))
            live = runner.decode(wanted)
            args = jax.tree.leaves((weights, *state, wanted, runner.allow_all()))
            _, decode_state, packed, _ = jax.tree.unflatten(jax.tree.structure(step.results), exported.call(*args))
            assert np.array_equal(packed.integers, live.integers)
            assert np.array_equal(decode_state.text, runner.decode_state.text)
            # one program sums floats in another order than several
            np.testing.assert_allclose(packed.floats, live.floats, atol=2e-3)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_step_lowers_for_platforms_that_are_not_here(parts: tuple[StepConfig, Weights], platform: str) -> None:
    config, _ = parts
    step = export.DecodeStep.of(config, rows=2, pages=4)
    exported = step.export(platform)
    assert exported.platforms == (platform,)
    assert [(aval.shape, aval.dtype) for aval in exported.in_avals] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(step.arguments)
    ]
    assert "custom_call @atlas_" not in exported.mlir_module(), "no native kernel of this machine"


def test_the_shapes_are_those_of_the_loaded_weights(parts: tuple[StepConfig, Weights]) -> None:
    config, weights = parts
    described = weight_shapes(config)
    assert jax.tree.structure(described) == jax.tree.structure(weights)
    for one, other in zip(jax.tree.leaves(described), jax.tree.leaves(weights), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
