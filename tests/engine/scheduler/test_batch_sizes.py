"""A row's steps in batches of every size: no bit differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine.api import MemoryParams, SamplingParams
from atlas_jax.engine.runner.base import Buckets
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from atlas_jax.engine.runner.step import StepConfig, Weights
from atlas_jax.engine.runner.step_inputs import MemoryWrite, memory_settings, recent_text, sampling_state
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.recall import adapter_store
from tests import tiny_model

SIZES = (1, 4)
STEPS = 8
DEGREE = 2


@pytest.mark.parametrize("kernels", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_row_is_what_it_would_be_alone(kernels: bool, tmp_path: Path) -> None:
    """Its memory too, which is written before, read in every step, and written again after."""
    choice = KernelChoice(cpu=kernels)
    model = tiny_model.write_model(tmp_path / "model.gguf", tiny_model.LLAMA)
    adapter = tiny_model.write_adapter(tmp_path / "adapter.safetensors", model)
    with GGUFFile.open(model) as file, choice.scope():
        config, params = model_config(file), load_params(file, model_config(file))
        memory, found = adapter_store.decode(adapter.read_bytes(), file.fingerprint(), config, max_window=2 * PAGE)
    memory = dataclasses.replace(memory, max_kept=PAGE)
    weights = Weights(params, found, jnp.arange(1, config.vocab + 1) % config.vocab)
    runner = PretrainedRunner(StepConfig(config, memory, choice), weights, "int8", Buckets(rows=SIZES, pages=(4,)))
    how = MemoryParams(window_size=PAGE)
    plan, settings = PageSchedule(window=1), memory_settings(how, 1, DEGREE)
    write = MemoryWrite.from_params(how, SessionShape(plan, 1, DEGREE, kept=PAGE))
    text = np.random.default_rng(1).integers(0, 340, 3 * PAGE).tolist()
    row = runner.new_row(4)
    for page in range(3):
        row = runner.start_page(row, plan.next_page(page), write)
        row = [*runner.prefill(row, settings, text[page * PAGE : (page + 1) * PAGE])][-1].row
    sampling = sampling_state(SamplingParams(temperature=0.8, logprobs=3), config.vocab, 7, [])

    def steps(size: int, place: int) -> list[np.ndarray]:
        runner.resize(size, 4, {})
        begun = jax.tree.map(jnp.copy, row)
        runner.insert(place, begun, 3, recent_text(text, len(text)), sampling, settings, with_memory=True)
        runner.start_page_in_batch(place, plan.next_page(3), write)
        wanted = np.zeros(size, np.int32)
        wanted[place] = 1
        told = [runner.decode(wanted) for _ in range(STEPS)]
        assert np.asarray(told[-1].floats)[place, 0, 1] > 0, "the memory is read"
        runner.start_page_in_batch(place, plan.next_page(4), write)
        return [np.asarray(leaf)[place, 0] for leaf in jax.tree.leaves(told)] + [
            np.asarray(leaf)[place] for leaf in jax.tree.leaves(runner.sequences)
        ]

    alone = steps(1, 0)
    for size in SIZES[1:]:
        for place in (0, size - 1):
            for found_here, wanted_here in zip(steps(size, place), alone, strict=True):
                if found_here.shape != wanted_here.shape:  # only small batches tell what they would draft next
                    wanted_here = wanted_here[: len(found_here)]
                np.testing.assert_array_equal(found_here, wanted_here)
