"""From a GGUF file to what an engine runs: a pretrained model with the recall memory, or a trained one with its own."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE, ConfigError
from atlas_jax.engine.adapter_finder import NOT_FITTED, AdapterFinder, Fitted
from atlas_jax.engine.api import ModelInfo
from atlas_jax.engine.runner import bigram_table
from atlas_jax.engine.runner.base import MAX_DRAFT_ROWS, Buckets, ModelRunner
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from atlas_jax.engine.runner.step import StepConfig, Weights
from atlas_jax.engine.runner.trained import TrainedRunner
from atlas_jax.engine.sessions.recall_layout import RecallLayout
from atlas_jax.engine.sessions.session import Layout
from atlas_jax.engine.sessions.trained_layout import TrainedLayout
from atlas_jax.gguf import (
    FALLBACK_TEMPLATE,
    ChatTemplate,
    GGUFError,
    GGUFFile,
    TemplateError,
    Tokenizer,
    recommended_sampling,
)
from atlas_jax.kernels.attention import KVDtype
from atlas_jax.model.lm import streaming
from atlas_jax.model.lm.config import MEMORY_KINDS
from atlas_jax.model.lm.export import ARCHITECTURE as TRAINED
from atlas_jax.model.lm.export import read_gguf
from atlas_jax.model.loading import WeightDtype, left_out, load_params, model_config, parameter_count
from atlas_jax.sharding import on_mesh

log = logging.getLogger("atlas.engine")

_LARGEST_STATE = 1 << 30
"""Bytes of one row of a trained model: what its configuration asks for is a stranger's word."""
_LONGEST = (1 << 30) - 1
"""Positions that rotations are exact for."""


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be served.

    Attributes:
      template: or why the model's own cannot be used, which costs conversations and nothing else.
      layout: of its sessions' snapshots; None keeps no sessions.
      longest_prompt: tokens of the longest plain request.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    template: ChatTemplate | TemplateError
    runner: ModelRunner
    layout: Layout | None
    longest_prompt: int


def open_pretrained(
    file: GGUFFile,
    *,
    cache: Path | None,
    memory: bool,
    adapter_path: Path | None,
    max_running: int,
    max_context: int,
    max_window: int,
    memory_dim: int | None,
    weight_dtype: WeightDtype,
    kv_dtype: KVDtype,
    speculate: bool,
    mesh_data: int,
    mesh_model: int,
) -> Opened:
    """A model of a known family, and unless `memory` is False its recall memory; arguments as for `Engine.open`.

    Raises:
      ConfigError, GGUFError, UnsupportedModel, AdapterError: as `Engine.open`.
    """
    started = _loading(file)
    tokenizer, template = _text(file)
    config, fingerprint = model_config(file), file.fingerprint()
    mesh_layout = on_mesh(config, mesh_data, mesh_model)
    if mesh_data > max_running:
        raise ConfigError(f"mesh_data ({mesh_data}) must not exceed the requests that run at once, {max_running}")
    params = load_params(file, config, dtype=weight_dtype, mesh_layout=mesh_layout)
    if others := left_out(file):
        names = ", ".join(sorted({f"{name.split('.', 1)[0]}.*" for name in others}))
        log.info(
            "Left out of %s: %d tensors that are no part of its text model (%s)", file.path.name, len(others), names
        )
    log.info("Loaded %s in %.1f s", file.path.name, time.monotonic() - started)
    context = min(max_context, config.context_length)
    fitted: Fitted | None = None
    unavailable: str | None = None
    if memory:
        finder = AdapterFinder(
            file, config, tokenizer, params, max_window=max_window, memory_dim=memory_dim, mesh_layout=mesh_layout
        )
        fitted = finder.find(adapter_path, cache)
        if fitted is None:
            unavailable = NOT_FITTED
    found, adapter = (None, None) if fitted is None else (fitted.config, fitted.adapter)
    successor = bigram_table.find(cache, fingerprint, config.vocab)
    pages = max(context // PAGE, 1, 0 if found is None else (max_window + found.max_omega_window) // PAGE)
    # attention over float pages is never of a single row of a single token: it would round differently
    alone = 1 if speculate or kv_dtype == "int8" else 2
    buckets = Buckets(
        _powers(max(alone, mesh_data), max_running),
        _powers(4, pages),
        max_draft_rows=MAX_DRAFT_ROWS if speculate else 0,
    )
    weights = Weights(params, adapter, jnp.asarray(successor))
    runner = PretrainedRunner(StepConfig(config, found), weights, kv_dtype, buckets, mesh_layout)
    info = _info(
        file,
        runner,
        architecture=config.family,
        parameters=parameter_count(params),
        context_length=context,
        layers=len(config.layers),
        embedding_size=config.embed,
        memory_layers=() if found is None else found.layers,
        memory_dim=None if found is None else found.components,
        adapter=None if fitted is None else fitted.source,
        memory_unavailable=unavailable,
    )
    layout = None if fitted is None else RecallLayout(config, fitted.config, kv_dtype, fingerprint, fitted.digest)
    return Opened(info, tokenizer, template, runner, layout, context)


def open_trained(file: GGUFFile, *, max_running: int, max_context: int, sessions: bool) -> Opened:
    """A model of `atlas_jax.model.lm` as `export_gguf` writes it; without sessions unless they are wanted.

    Raises:
      GGUFError: it cannot be served; the message says what is wrong.
    """
    started = _loading(file)
    tokenizer, template = _text(file)
    config, params = read_gguf(file)
    tokens = tokenizer.vocab_size
    if tokens > config.vocab:
        raise GGUFError(f"the tokenizer has {tokens} tokens, the model {config.vocab}")
    if tokens < config.vocab:  # rows that pad the vocabulary stand for nothing
        config = config.replace(vocab=tokens)
        params = params | {name: params[name][:tokens] for name in ("embed", "head") if name in params}
    context = min(max_context, config.context_length)
    state = jax.eval_shape(lambda: streaming.init_state(config, params, 1, context=context))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if size > _LARGEST_STATE:
        raise GGUFError(
            f"{TRAINED}.config: the state of one sequence would take {size} bytes, at most {_LARGEST_STATE}"
        )
    runner = TrainedRunner(config, params, context, _powers(1, max_running))
    log.info("Loaded %s in %.1f s", file.path.name, time.monotonic() - started)
    info = _info(
        file,
        runner,
        architecture=TRAINED,
        parameters=sum(int(leaf.size) for leaf in jax.tree.leaves(params)),
        context_length=context,
        layers=len(config.pattern),
        embedding_size=config.embed,
        memory_layers=tuple(index for index, kind in enumerate(config.pattern) if kind in MEMORY_KINDS),
        adapter=None,
    )
    layout = TrainedLayout.of(config, runner.row_shapes(1), file.fingerprint()) if sessions else None
    longest = _LONGEST if streaming.bounded(config) else context
    return Opened(info, tokenizer, template, runner, layout, longest)


def _loading(file: GGUFFile) -> float:
    """Says what is being loaded; the time."""
    log.info("Loading %s (%.0f MB)", file.path.name, file.path.stat().st_size / 1e6)
    return time.monotonic()


def _info(file: GGUFFile, runner: ModelRunner, **facts: Any) -> ModelInfo:
    return ModelInfo(
        name=file.name,
        fingerprint=file.fingerprint(),
        size_bytes=file.size,
        vocab_size=runner.vocab,
        state_bytes_per_session=_state_bytes(runner),
        created=int(file.path.stat().st_mtime),
        sampling=recommended_sampling(file.metadata),
        **facts,
    )


def _text(file: GGUFFile) -> tuple[Tokenizer, ChatTemplate | TemplateError]:
    tokenizer = Tokenizer.from_metadata(file.metadata)
    try:
        template = ChatTemplate.from_metadata(file.metadata)
    except TemplateError as error:
        log.warning("The model's chat template cannot be used, so only plain completions are served: %s", error)
        return tokenizer, error
    if template is not None:
        return tokenizer, template

    def text(token: int | None) -> str:
        return "" if token is None else tokenizer.decode([token])

    bos, eos = text(tokenizer.bos_id), text(tokenizer.eos_id)
    return tokenizer, ChatTemplate(FALLBACK_TEMPLATE, bos_token=bos, eos_token=eos)


def _state_bytes(runner: ModelRunner) -> int:
    """Bytes of one row's memory and smallest ring."""
    row = runner.row_shapes(runner.buckets.pages[0])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))


def _powers(first: int, last: int) -> tuple[int, ...]:
    """first, 2·first, 4·first … and the power that reaches `last`."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)
