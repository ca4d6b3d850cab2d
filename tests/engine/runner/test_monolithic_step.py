"""A decode step as one program, against the same step in stages: no bit differs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.aot import INLINE, AotProgram
from atlas_jax.config import PAGE
from atlas_jax.engine.api import MemoryParams, SamplingParams
from atlas_jax.engine.runner.base import Buckets
from atlas_jax.engine.runner.decode_state import DRAFT_TOKENS
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from atlas_jax.engine.runner.step import StepConfig, Weights
from atlas_jax.engine.runner.step_inputs import memory_settings, recent_text, sampling_state
from atlas_jax.engine.runner.step_programs import StepPrograms, decode_inputs, weight_shapes
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.attention import uses_cpu_kernel
from atlas_jax.model import layer_groups
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.transformer import SINKS
from atlas_jax.recall import adapter_store
from tests import tiny_model

SHAPE = tiny_model.Shape(layers=3, embed=64, heads=2, kv_heads=1, head_dim=64, ff=128, nibbles=True)
HYBRID = dataclasses.replace(tiny_model.HYBRID, heads=2, kv_heads=1, head_dim=64, delta_heads=(1, 2))
STEPS = 6


@pytest.mark.skipif(not uses_cpu_kernel(1, SHAPE.head_dim, SINKS), reason="no native kernels")
@pytest.mark.parametrize(
    ("shape", "max_draft_rows"),
    [pytest.param(SHAPE, 0, marks=pytest.mark.slow), (SHAPE, 1), pytest.param(HYBRID, 0, marks=pytest.mark.slow)],
)
def test_one_program_computes_what_the_stages_do(
    shape: tiny_model.Shape, max_draft_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_groups, "_PREFERRED", (1,))
    model = tiny_model.write_model(tmp_path / "model.gguf", shape)
    adapter = tiny_model.write_adapter(tmp_path / "adapter.safetensors", model)
    with GGUFFile.open(model) as file:
        config, params = model_config(file), load_params(file, model_config(file))
        memory, found = adapter_store.decode(adapter.read_bytes(), file.fingerprint(), config, max_window=2 * PAGE)
    weights = Weights(params, found, jnp.arange(1, config.vocab + 1) % config.vocab)
    runner = PretrainedRunner(
        StepConfig(config, memory), weights, "int8", Buckets(rows=(1,), pages=(4,), max_draft_rows=max_draft_rows)
    )
    row = runner.start_page(runner.new_row(4), PageSchedule(None).next_page(0), None)
    text = [3, 4, 5, 6] * 8
    row = [*runner.prefill(row, memory_settings(MemoryParams(), 1, 1), text)][-1].row
    sampling = sampling_state(SamplingParams(temperature=0.8), config.vocab, 7, [])
    settings = memory_settings(MemoryParams(), 1, 1)
    runner.insert(0, row, 3, recent_text(text, len(text)), sampling, settings, with_memory=True)

    def steps() -> list[np.ndarray]:
        return [
            np.asarray(leaf)
            for _ in range(STEPS)
            for leaf in jax.tree.leaves(runner.decode(np.full(1, 1 + DRAFT_TOKENS, np.int32)))
        ] + [np.asarray(leaf) for leaf in jax.tree.leaves((runner.sequences, runner.decode_state))]

    begun = jax.tree.map(np.asarray, (runner.sequences, runner.decode_state))

    def begin_again() -> None:
        runner.sequences, runner.decode_state = jax.tree.map(jnp.asarray, begun)

    in_stages = steps()
    begin_again()
    runner.compile_monolithic_step(1, 4)
    assert runner.is_monolithic
    for one, other in zip(steps(), in_stages, strict=True):
        np.testing.assert_array_equal(one, other)
    if max_draft_rows:
        wanted = tokens_of(in_stages[: 2 * STEPS : 2])
        begin_again()
        runner.compile_plain_decode(1, 4)
        assert runner.widths == (1, 1 + DRAFT_TOKENS)
        mixed = [runner.decode(np.full(1, width, np.int32), width=width) for width in (1, 3, 1, 1, 3)]
        found = tokens_of([np.asarray(one.integers) for one in mixed])
        assert found == wanted[: len(found)], "whether drafts are fed does not show in what is drawn"


def tokens_of(integers: list[np.ndarray]) -> list[int]:
    """What steps have drawn."""
    return [int(token) for one in integers for token in one[0, :, 0] if token >= 0]


@pytest.mark.skipif(not uses_cpu_kernel(1, SHAPE.head_dim, SINKS), reason="no native kernels")
def test_scores_need_no_memory_of_their_own(tmp_path: Path) -> None:
    with GGUFFile.open(tiny_model.write_model(tmp_path / "model.gguf", SHAPE)) as file:
        config = StepConfig(dataclasses.replace(model_config(file), vocab=1 << 16), None)
    rows = 2
    *inputs, logits_buffer = decode_inputs(config, weight_shapes(config), rows, 4, "int8")

    def temporary(*rest: Any) -> int:
        decode = functools.partial(StepPrograms(config).decode, INLINE)
        program = AotProgram(decode, donate=(1, 2, 5)[: 2 + len(rest)])
        size: int = program.executable((), *inputs, *rest).memory_analysis().temp_size_in_bytes
        return size

    assert temporary() - temporary(logits_buffer) >= rows * config.model.vocab * 4
