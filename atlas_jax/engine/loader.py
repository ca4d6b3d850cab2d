"""From a GGUF file to what an engine runs: a pretrained model with the recall memory, or a trained one with its own."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE, ConfigError, MemoryConfig
from atlas_jax.engine.adapter_finder import FITTING, NOT_FITTED, AdapterFinder, Fitted
from atlas_jax.engine.api import LoraInfo, ModelInfo, Pooling, StateBytes
from atlas_jax.engine.config import EngineConfig, lora_files
from atlas_jax.engine.memory_budget import SessionBytes, default_budget, session_bytes
from atlas_jax.engine.memory_options import MemoryOptions
from atlas_jax.engine.runner import bigram_table
from atlas_jax.engine.runner.base import MAX_DRAFT_ROWS, Buckets, ModelRunner
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from atlas_jax.engine.runner.step import StepConfig, Weights
from atlas_jax.engine.runner.trained import TrainedRunner
from atlas_jax.engine.sessions.layout import Layout
from atlas_jax.engine.sessions.recall_layout import RecallLayout
from atlas_jax.engine.sessions.trained_layout import TrainedLayout
from atlas_jax.gguf import (
    FALLBACK_TEMPLATE,
    ChatTemplate,
    GGUFError,
    GGUFFile,
    ModelFile,
    TemplateError,
    Tokenizer,
    infill_tokens,
    recommended_sampling,
)
from atlas_jax.kernels import kernel_choice
from atlas_jax.model.checkpoint import open_model_file
from atlas_jax.model.lm import streaming
from atlas_jax.model.lm.config import MEMORY_KINDS
from atlas_jax.model.lm.export import ARCHITECTURE as TRAINED
from atlas_jax.model.lm.export import read_gguf
from atlas_jax.model.loading import left_out, load_params, model_config, parameter_count
from atlas_jax.model.lora import with_adapters
from atlas_jax.model.lora_file import LoraError, LoraFile
from atlas_jax.progress import Progress
from atlas_jax.sharding import on_mesh

log = logging.getLogger("atlas.engine")

_LARGEST_STATE = 1 << 30
"""Bytes of one row of a trained model: what its configuration asks for is a stranger's word."""
_POOLING: dict[object, Pooling] = {0: "mean", 1: "mean", 3: "last"}
"""By llama.cpp's number; 0 says that the file leaves it to the user."""
_LONGEST = (1 << 30) - 1
"""Positions that rotations are exact for."""


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be served.

    Attributes:
      template: or why the model's own cannot be used, which costs conversations and nothing else.
      layout: of its sessions' snapshots; None keeps no sessions.
      longest_prompt: tokens of the longest plain request.
      fit: fits the memory that the model is still without, and opens the model with it: with another runner, and the same
        weights. None where there is nothing to fit.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    template: ChatTemplate | TemplateError
    runner: ModelRunner
    layout: Layout | None
    longest_prompt: int
    fit: Callable[[Progress], Opened] | None = None


def open_model(config: EngineConfig, cache: Path | None) -> Opened:
    """Opens a model of either kind; errors as for `Engine.open`.

    Args:
      cache: folder of what earlier starts have left, or None.
    """
    with open_model_file(config.find_model()) as file:
        if isinstance(file, GGUFFile) and file.require("general.architecture", str) == TRAINED:
            return _open_trained(file, config)
        return _open_pretrained(file, config, cache)


def _open_pretrained(file: ModelFile, config: EngineConfig, cache: Path | None) -> Opened:
    """A model of a known family and, if that is wanted, its recall memory."""
    started = _loading(file)
    tokenizer, template = _text(file)
    model, fingerprint = model_config(file), file.fingerprint()
    mesh_layout = on_mesh(model, config.mesh_data, config.mesh_model)
    params = plain = load_params(file, model, dtype=config.weight_dtype, mesh_layout=mesh_layout)
    if others := left_out(file):
        names = ", ".join(sorted({name[: name.index(".", 4 * name.startswith("blk."))] + ".*" for name in others}))
        log.info("Left out of %s: %d tensors that are no part of its text model (%s)", file.name, len(others), names)
    log.info("Loaded %s in %.1f s", file.name, time.monotonic() - started)
    lora = _read_lora(config)
    if lora:
        params = with_adapters(params, file, model, lora, dtype=config.weight_dtype)
        log.info("Loaded %s beside it", ", ".join(f"LoRA adapter {one.name}" for one in lora))
    context = min(config.max_context, model.context_length)
    turns, infill, pooling = _turn_tokens(file, tokenizer), _infill(file, tokenizer), _pooling(file, config)
    bigrams = jnp.asarray(bigram_table.find(cache, fingerprint, model.vocab))
    created, parameters = int(file.path.stat().st_mtime), parameter_count(plain)
    digests = tuple(one.digest for one in lora)

    def opened(fitted: Fitted | None, unavailable: str | None = None) -> Opened:
        memory, adapter = (None, None) if fitted is None else (fitted.config, fitted.adapter)
        budget = 0
        if memory is not None:
            sizes = session_bytes(model, memory, config.kv_dtype)
            budget = _budget(config, sizes)
            memory = dataclasses.replace(memory, max_kept=sizes.kept(budget, _default_window(config)))
        step_config = StepConfig(model, memory, kernel_choice.chosen(), turns, digests)
        # what a model has read into states of its own cannot be taken back, so it is fed no drafts
        buckets = _buckets(config, context, memory, speculate=config.speculate and not model.recurrent)
        runner = PretrainedRunner(
            step_config, Weights(params, adapter, bigrams), config.kv_dtype, buckets, mesh_layout, budget
        )
        info = _info(
            file,
            runner,
            StateBytes(window=_row_bytes(runner))
            if memory is None
            else sizes.parts(_default_window(config), memory.max_kept, budget),
            created=created,
            architecture=model.family,
            parameters=parameters,
            context_length=context,
            layers=len(model.layers),
            embedding_size=model.embed,
            memory_layers=() if memory is None else memory.layers,
            kept_pairs_capacity=0 if memory is None else memory.max_kept,
            memory_dim=None if memory is None else memory.components,
            adapter=None if fitted is None else fitted.source,
            pooling=pooling,
            infill=infill,
            lora=tuple(_lora_info(one, scale) for one, (_, scale) in zip(lora, lora_files(config.lora), strict=True)),
            memory_unavailable=unavailable,
        )
        layout = (
            None
            if fitted is None or memory is None
            else RecallLayout(model, memory, config.kv_dtype, fingerprint, fitted.digest, digests)
        )
        return Opened(info, tokenizer, template, runner, layout, context)

    if not config.memory_enabled:
        return opened(None)
    finder = AdapterFinder(
        file,
        model,
        tokenizer,
        plain,
        max_window=config.max_window,
        memory_dim=config.memory_dim,
        mesh_layout=mesh_layout,
        seconds=config.calibration_seconds,
    )
    fitted = finder.there(None if config.adapter_path is None else Path(config.adapter_path), cache)
    if fitted is not None:
        return opened(fitted)
    if config.several_processes:
        raise ConfigError(
            "adapter_path: no memory has been fitted to this model yet, and several processes cannot fit one together. "
            "`python -m atlas_jax.recall.fit` on one machine makes the adapter that each needs; without a memory the model "
            "can be served"
        )
    _budget(config, session_bytes(model, finder.unfitted, config.kv_dtype))  # one that is wrong is said now

    def fit(progress: Progress | None = None) -> Opened:
        made = finder.calibrated(cache, progress)
        return opened(made, None if made is not None else NOT_FITTED)

    if config.calibrate_in_background:
        return dataclasses.replace(opened(None, FITTING), fit=fit)
    return fit()


def _read_lora(config: EngineConfig) -> list[LoraFile]:
    """The adapters; raises LoraError, also for one that is given twice, whose two scales nobody could tell apart."""
    found = dict[str, LoraFile]()
    for path, _ in lora_files(config.lora):
        one = LoraFile.read(path)
        if one.digest in found:
            raise LoraError(f"LoRA adapter {one.name}: it is the same as {found[one.digest].name}")
        found[one.digest] = one
    return list(found.values())


def _lora_info(adapter: LoraFile, scale: float) -> LoraInfo:
    return LoraInfo(
        name=adapter.name,
        digest=adapter.digest,
        scale=scale,
        task_name=adapter.task_name,
        prompt_prefix=adapter.prompt_prefix,
    )


def _default_window(config: EngineConfig) -> int:
    """Tokens attended exactly where a request does not say how many."""
    return min(MemoryOptions().window_size, config.max_window)


def _budget(config: EngineConfig, sizes: SessionBytes) -> int:
    """Bytes of one session's state; raises ConfigError where not even what is always there fits."""
    if config.memory_budget is None:
        return default_budget(sizes)
    window = _default_window(config)
    least = sizes.total(window, 0)
    if 0 < config.memory_budget < least:
        raise ConfigError(
            f"memory_budget is {config.memory_budget}: a window of {window} tokens and the recall memory of this model take "
            f"{least} bytes; 0 keeps no pairs beside them"
        )
    return config.memory_budget


def _pooling(file: ModelFile, config: EngineConfig) -> Pooling | None:
    """How embeddings are made: as the operator says, else as the file does, else of the mean."""
    if config.pooling is not None:
        return config.pooling
    kind = file.metadata.get(f"{file.metadata.get('general.architecture')}.pooling_type")
    if kind is None or kind in _POOLING:
        return _POOLING[kind or 0]
    log.warning(
        "The model's file asks for pooling of type %s, which there is not: no embeddings without --pooling", kind
    )
    return None


def _infill(file: ModelFile, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """What `ModelInfo.infill` says; a text begins as all of the model's do."""
    found = infill_tokens(file.metadata, tokenizer.control_tokens, tokenizer.vocab_size)
    if found is None:
        return None
    prefix, suffix, middle = found
    begin = (tokenizer.bos_id,) if tokenizer.add_bos and tokenizer.bos_id is not None else ()
    return (*begin, prefix), (suffix,), (middle,)


def _turn_tokens(file: ModelFile, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Control tokens that the model's own chat template names: turns of a conversation begin and end with them."""
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        return ()
    return tuple(sorted(token for text, token in tokenizer.special_tokens.items() if text in template))


def _buckets(config: EngineConfig, context: int, memory: MemoryConfig | None, *, speculate: bool) -> Buckets:
    """The sizes that steps are compiled for."""
    pages = max(context // PAGE, 1, 0 if memory is None else (config.max_window + memory.max_omega_window) // PAGE)
    # attention over float pages is never of a single row of a single token: it would round differently
    alone = 1 if speculate or config.kv_dtype == "int8" else 2
    return Buckets(
        _powers(max(alone, config.mesh_data), config.max_concurrent),
        _powers(4, pages),
        max_draft_rows=MAX_DRAFT_ROWS if speculate else 0,
    )


def _open_trained(file: GGUFFile, config: EngineConfig) -> Opened:
    """A model of `atlas_jax.model.lm` as `export_gguf` writes it; raises GGUFError if it cannot be served."""
    if config.devices != 1:
        raise ConfigError("mesh_data and mesh_model must be 1: a model with its own memory runs on one device")
    if config.lora:
        raise ConfigError(
            "lora cannot be set: LoRA adapters are for pretrained models, this one was trained with atlas-jax"
        )
    for name in ("memory_dim", "memory_budget"):
        if config.memory_enabled and getattr(config, name) is not None:
            raise ConfigError(f"{name} cannot be set: this model was trained with a memory of its own")
    started = _loading(file)
    tokenizer, template = _text(file)
    model, params = read_gguf(file)
    tokens = tokenizer.vocab_size
    if tokens > model.vocab:
        raise GGUFError(f"the tokenizer has {tokens} tokens, the model {model.vocab}")
    if tokens < model.vocab:  # rows that pad the vocabulary stand for nothing
        model = model.replace(vocab=tokens)
        params = params | {name: params[name][:tokens] for name in ("embed", "head") if name in params}
    context = min(config.max_context, model.context_length)
    state = jax.eval_shape(lambda: streaming.init_state(model, params, 1, context=context))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if size > _LARGEST_STATE:
        raise GGUFError(
            f"{TRAINED}.config: the state of one sequence would take {size} bytes, at most {_LARGEST_STATE}"
        )
    runner = TrainedRunner(model, params, context, _powers(1, config.max_concurrent), kernel_choice.chosen())
    log.info("Loaded %s in %.1f s", file.name, time.monotonic() - started)
    info = _info(
        file,
        runner,
        StateBytes(memory=_row_bytes(runner)),
        created=int(file.path.stat().st_mtime),
        architecture=TRAINED,
        parameters=sum(int(leaf.size) for leaf in jax.tree.leaves(params)),
        context_length=context,
        layers=len(model.pattern),
        embedding_size=model.embed,
        memory_layers=tuple(index for index, kind in enumerate(model.pattern) if kind in MEMORY_KINDS),
        adapter=None,
        pooling=config.pooling or "mean",
    )
    layout = TrainedLayout.of(model, runner.row_shapes(1), file.fingerprint()) if config.memory_enabled else None
    longest = _LONGEST if streaming.bounded(model) else context
    return Opened(info, tokenizer, template, runner, layout, longest)


def _loading(file: ModelFile) -> float:
    """Says what is being loaded; the time."""
    log.info("Loading %s (%.0f MB)", file.name, file.size / 1e6)
    return time.monotonic()


def _info(file: ModelFile, runner: ModelRunner, state: StateBytes, **facts: Any) -> ModelInfo:
    return ModelInfo(
        name=file.name,
        fingerprint=file.fingerprint(),
        size_bytes=file.size,
        vocab_size=runner.vocab,
        state=state,
        sampling=recommended_sampling(file.metadata),
        **facts,
    )


def _text(file: ModelFile) -> tuple[Tokenizer, ChatTemplate | TemplateError]:
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


def _row_bytes(runner: ModelRunner) -> int:
    """Bytes of one row with its smallest ring."""
    row = runner.row_shapes(runner.buckets.pages[0])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))


def _powers(first: int, last: int) -> tuple[int, ...]:
    """first, 2·first, 4·first … and the power that reaches `last`."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)
