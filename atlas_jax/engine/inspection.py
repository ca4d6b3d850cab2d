"""What is in a model's file or folder or in a LoRA adapter, and what an engine would do with it, without loading weights."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from atlas_jax.config import MemoryConfig, ModelConfig
from atlas_jax.engine.api import StateBytes
from atlas_jax.engine.config import EngineConfig
from atlas_jax.engine.kernels import kernels_of
from atlas_jax.engine.memory_budget import default_budget, session_bytes
from atlas_jax.engine.memory_options import MemoryOptions
from atlas_jax.gguf import ChatTemplate, GGUFError, GGUFFile, ModelFile, TemplateError, Tokenizer, recommended_sampling
from atlas_jax.kernels.linear import PackedArray, QuantArray
from atlas_jax.model.checkpoint import open_model_file
from atlas_jax.model.families import UnsupportedModel
from atlas_jax.model.lm.export import ARCHITECTURE as TRAINED
from atlas_jax.model.lm.export import check_gguf
from atlas_jax.model.loading import left_out, model_config, parameter_count
from atlas_jax.model.lora import check_adapter
from atlas_jax.model.lora_file import LoraError, LoraFile
from atlas_jax.model.params import ModelParams
from atlas_jax.model.tensor_shapes import loaded_shapes
from atlas_jax.recall import adapter_store
from atlas_jax.recall.adapter_store import AdapterError
from atlas_jax.recall.calibration import DEFAULT_DIM, candidates

AdapterPlace = Literal["shipped", "cached", "to be fitted", "not looked for"]
DIGESTED_BYTES = 4 << 30
"""Files up to this size are read to the end for their fingerprint, which adapters are found by."""


@dataclass(frozen=True)
class TensorTypes:
    """The tensors of one type, or the weights of one form in memory."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class TokenizerFacts:
    """The file's tokenizer; `problem` says why it cannot be used."""

    kind: str
    pre: str
    tokens: int
    bos: str | None = None
    eos: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class TemplateFacts:
    """The file's chat template, and what it can do beside writing messages.

    Attributes:
      own: whether the file has one; without, a plain one is used.
      tools: whether it writes tools, calls and their results.
    """

    own: bool
    system: bool = True
    tools: bool = False
    thinking: tuple[str, str] | None = None
    channels: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class MemoryFacts:
    """The memory the model would have.

    Attributes:
      adapter: where what it must know of the model comes from.
      dim, features: of its keys.
      layers: tapped ones, best first; empty where none are ranked yet.
      window: tokens of the exact window.
      kept_pairs: per KV head and on average per layer.
    """

    adapter: AdapterPlace
    dim: int
    features: int
    layers: tuple[int, ...]
    window: int
    kept_pairs: int
    state: StateBytes


@dataclass(frozen=True)
class Inspection:
    """One model.

    Attributes:
      kind: "gguf", or "safetensors" for a folder.
      fingerprint: None where the file is too large to be read for it.
      refusal: why it would not be served, naming the key or the tensor; None where it would.
      left_out: how many tensors are no part of the text model.
      weights: forms of the weights in memory, scales with them; empty where it would be refused.
      memory: None where it would be refused, or has a memory of its own.
    """

    name: str
    kind: str
    path: str
    size: int
    architecture: str
    fingerprint: str | None
    refusal: str | None
    parameters: int
    layers: int | None
    embedding_size: int | None
    heads: tuple[int, int] | None
    context_length: int | None
    vocab_size: int | None
    tensors: int
    left_out: int
    types: tuple[TensorTypes, ...]
    tokenizer: TokenizerFacts
    template: TemplateFacts
    sampling: Mapping[str, float]
    weights: tuple[TensorTypes, ...] = ()
    memory: MemoryFacts | None = None
    own_memory: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Bytes of the weights in memory."""
        return sum(one.bytes for one in self.weights)


def inspect_model(
    path: Path, cache: Path | None, *, config: EngineConfig | None = None, digest: bool = False
) -> Inspection:
    """Looks at a model.

    Args:
      cache: folder of what earlier starts have left, where an adapter may be.
      config: settings of the engine that would serve it; None takes the defaults.
      digest: whether even a very large file is read to its end for its fingerprint.

    Raises:
      GGUFError: it is no model, or a damaged or hostile one; the message says what is wrong.
      OSError: it cannot be read.
    """
    with open_model_file(path) as file:
        return _inspected(file, cache, config or EngineConfig(model_path=path), digest)


@dataclass(frozen=True)
class LoraInspection:
    """A LoRA adapter.

    Attributes:
      ranks: from the least to the greatest.
      weights: how many it changes, by their name without the layer.
      refusal: why it cannot be used with the model it was held against; None where it can, or there was none.
    """

    name: str
    path: str
    size: int
    architecture: str
    digest: str
    alpha: float
    ranks: tuple[int, int]
    layers: int
    parameters: int
    weights: Mapping[str, int]
    task_name: str
    prompt_prefix: str
    refusal: str | None = None


def is_lora(path: Path) -> bool:
    """Whether a file is an adapter and no model; raises GGUFError, OSError."""
    if path.is_dir():
        return False
    with GGUFFile.open(path) as file:
        return file.metadata.get("general.type") == "adapter"


def inspect_lora(path: Path, model: Path | None = None) -> LoraInspection:
    """Looks at a LoRA adapter.

    Args:
      model: a model to hold it against, of which no weight is loaded.

    Raises:
      LoraError: it is damaged, or of a kind that there is not.
      GGUFError, UnsupportedModel: the model is no model.
      OSError: a file cannot be read.
    """
    found = LoraFile.read(path)
    pairs = found.pairs
    ranks = sorted(pair.b.shape[1] for pair in pairs.values())
    kinds = Counter(re.sub(r"^blk\.\d+\.", "", name) for name in pairs)
    refusal = None
    if model is not None:
        with open_model_file(model) as file:
            try:
                check_adapter(found, file, model_config(file))
            except LoraError as error:
                refusal = str(error)
    return LoraInspection(
        name=found.name,
        path=str(path),
        size=path.stat().st_size,
        architecture=found.architecture,
        digest=found.digest,
        alpha=found.alpha,
        ranks=(ranks[0], ranks[-1]),
        layers=len({name.split(".")[1] for name in pairs if name.startswith("blk.")}),
        parameters=sum(pair.a.size + pair.b.size for pair in pairs.values()),
        weights=dict(sorted(kinds.items())),
        task_name=found.task_name,
        prompt_prefix=found.prompt_prefix,
        refusal=refusal,
    )


def _inspected(file: ModelFile, cache: Path | None, config: EngineConfig, digest: bool) -> Inspection:
    architecture = str(file.metadata.get("general.architecture"))
    fingerprint = file.fingerprint() if digest or file.size <= DIGESTED_BYTES else None
    known: dict[str, Any] = {
        "name": file.name,
        "kind": "gguf" if isinstance(file, GGUFFile) else "safetensors",
        "path": str(file.path),
        "size": file.size,
        "architecture": architecture,
        "fingerprint": fingerprint,
        "tensors": len(file.tensors),
        "left_out": len(left_out(file)),
        "types": _types(file),
        "tokenizer": _tokenizer(file),
        "template": _template(file),
        "sampling": recommended_sampling(file.metadata),
        "metadata": file.metadata,
    }
    facts: dict[str, Any] = {
        "refusal": known["tokenizer"].problem,
        "parameters": sum(int(np.prod(one.shape, dtype=np.int64)) for one in file.tensors.values()),
        "layers": None,
        "embedding_size": None,
        "heads": None,
        "context_length": None,
        "vocab_size": known["tokenizer"].tokens or None,
    }
    try:
        if isinstance(file, GGUFFile) and architecture == TRAINED:
            trained = check_gguf(file)
            facts |= {
                "layers": len(trained.pattern),
                "embedding_size": trained.embed,
                "heads": (trained.heads, trained.kv_heads),
                "context_length": trained.context_length,
                "own_memory": f"trained with its own: layers {trained.pattern}",
                "weights": (TensorTypes("float32", len(file.tensors), facts["parameters"], 4 * facts["parameters"]),),
            }
            return Inspection(**known, **facts)
        model = model_config(file)
        facts |= {
            "layers": len(model.layers),
            "embedding_size": model.embed,
            "heads": (model.heads, model.kv_heads),
            "context_length": model.context_length,
            "vocab_size": model.vocab,
        }
        with kernels_of(config).scope():
            params = loaded_shapes(file, model, dtype=config.weight_dtype)
        facts |= {"parameters": parameter_count(params), "weights": _forms(params)}
        facts["memory"] = _memory(model, fingerprint, cache, config)
    except (UnsupportedModel, GGUFError) as error:
        facts["refusal"] = facts["refusal"] or str(error)
        facts.pop("weights", None)
    return Inspection(**known, **facts)


def _types(file: ModelFile) -> tuple[TensorTypes, ...]:
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for info in file.tensors.values():
        found[info.ggml_type.name].append((int(np.prod(info.shape, dtype=np.int64)), info.nbytes))
    rows = [
        TensorTypes(name, len(ones), sum(one[0] for one in ones), sum(one[1] for one in ones))
        for name, ones in found.items()
    ]
    return tuple(sorted(rows, key=lambda one: -one.bytes))


def _tokenizer(file: ModelFile) -> TokenizerFacts:
    metadata = file.metadata
    kind, pre = (str(metadata.get(f"tokenizer.ggml.{name}", "")) for name in ("model", "pre"))
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list | tuple | np.ndarray) else 0
    try:
        made = Tokenizer.from_metadata(metadata)
    except (GGUFError, ValueError) as error:
        return TokenizerFacts(kind, pre, count, problem=str(error))

    def text(token: int | None) -> str | None:
        return None if token is None else made.decode([token])

    return TokenizerFacts(kind, pre, made.vocab_size, text(made.bos_id), text(made.eos_id))


def _template(file: ModelFile) -> TemplateFacts:
    try:
        made = ChatTemplate.from_metadata(file.metadata)
    except (TemplateError, GGUFError) as error:
        return TemplateFacts(own=True, problem=str(error))
    if made is None:
        return TemplateFacts(own=False)
    facts = made.facts
    return TemplateFacts(
        own=True, system=facts.takes_system, tools=bool(facts.call), thinking=facts.thinking, channels=facts.channels
    )


def _forms(params: ModelParams) -> tuple[TensorTypes, ...]:
    """The weights by their form, scales with what they belong to."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def weights() -> Iterator[Any]:
        yield from jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PackedArray | QuantArray))

    def name(leaf: Any) -> str:
        if isinstance(leaf, PackedArray):
            return f"{8 * leaf.form.value / leaf.form.span:.3g} bits"
        return "int8" if isinstance(leaf, QuantArray) else str(getattr(leaf, "dtype", "float32"))

    for leaf in weights():
        form = name(leaf)
        size = sum(int(np.prod(one.shape)) * one.dtype.itemsize for one in jax.tree.leaves(leaf))
        found[form].append((int(np.prod(leaf.shape)), size))
    rows = [
        TensorTypes(name, len(ones), sum(one[0] for one in ones), sum(one[1] for one in ones))
        for name, ones in found.items()
    ]
    return tuple(sorted(rows, key=lambda one: -one.bytes))


def _memory(model: ModelConfig, fingerprint: str | None, cache: Path | None, config: EngineConfig) -> MemoryFacts:
    dim = DEFAULT_DIM if config.memory_dim is None else config.memory_dim
    found, place = _adapter(model, fingerprint, cache, dim, config.max_window)
    memory = candidates(model, dim) if found is None else found
    sizes = session_bytes(model, memory, config.kv_dtype)
    window = min(MemoryOptions().window_size, config.max_window)
    budget = default_budget(sizes) if config.memory_budget is None else config.memory_budget
    kept = sizes.kept(budget, window)
    memory = dataclasses.replace(memory, max_kept=kept)
    layers = () if found is None else memory.layers
    state = sizes.parts(window, kept, budget)
    return MemoryFacts(place, memory.components, memory.features, layers, window, kept, state)


def _adapter(
    model: ModelConfig, fingerprint: str | None, cache: Path | None, dim: int, max_window: int
) -> tuple[MemoryConfig | None, AdapterPlace]:
    """The memory of the adapter that a start would find."""
    if fingerprint is None:
        return None, "not looked for"
    places: list[tuple[Path, AdapterPlace]] = []
    if dim == DEFAULT_DIM:
        places.append((adapter_store.shipped_path(fingerprint), "shipped"))
    if cache is not None:
        places.append((adapter_store.cached(cache / "adapters", fingerprint, dim), "cached"))
    for file, place in places:
        try:
            memory, _ = adapter_store.decode(file.read_bytes(), fingerprint, model, max_window=max_window)
        except (OSError, AdapterError):
            continue
        return memory, place
    return None, "to be fitted"
