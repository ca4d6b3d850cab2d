"""A checkpoint folder that shows itself as the GGUF file the converter of llama.cpp would make of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas_jax.gguf._header import GGUFError, TensorInfo, quote
from atlas_jax.gguf._nibbles import Nibbles
from atlas_jax.gguf._types import TensorType
from atlas_jax.model.checkpoint._files import CheckpointError, Shard, open_shards, read_bytes, read_json
from atlas_jax.model.checkpoint._tokenizer import Settings, tokenizer_metadata
from atlas_jax.model.families import FAMILIES, Family
from atlas_jax.model.families._checkpoint import Checkpoint, Config, Described
from atlas_jax.model.families._family import UnsupportedModel

_ROWS = 4096
"""Of a tensor, unpacked at a time."""
_TEXTS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_ROOT = {"embed_tokens": "token_embd", "norm": "output_norm"}
_NAME = re.compile(
    r"(?:(?:model\.)?language_model\.)?(?:model\.)?"
    r"(?:layers\.(?P<layer>\d{1,4})\.(?P<part>.+)|(?P<root>[a-z_]+))\.(?P<kind>weight|bias)"
)
_NUMBER = re.compile(r"\.(\d{1,4})(?=\.|$)")
_CACHED = re.compile(r"models--.+?--(?P<name>[^/]+)")


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor by its GGUF name: where it lies, and what the converter would do to it.

    Attributes:
      info: what the GGUF file would say of it.
      parts: the tensors that it is a stack of, each with its shard; one alone is itself.
      heads: whose rows are put in another order.
    """

    info: TensorInfo
    parts: tuple[tuple[int, TensorInfo], ...]
    heads: int = 0
    plus_one: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointFolder:
    """A folder with config.json, tokenizer.json and safetensors; see `atlas_jax.gguf.GGUFFile` for what it answers.

    Attributes:
      path: the folder.
      size: bytes of the weights.
      metadata: as the model's GGUF file has it.
      tensors: by their GGUF names.
    """

    path: Path
    size: int
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    _shards: tuple[Shard, ...] = field(repr=False)
    _stored: Mapping[str, _Stored] = field(repr=False)
    _made: Mapping[str, npt.NDArray[np.float32]] = field(repr=False)
    _digest: list[str] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, path: Path) -> CheckpointFolder:
        """Opens a folder and checks what is in it.

        Raises:
          CheckpointError: a file is damaged or hostile; the message names it and the field.
          UnsupportedModel: the class, or something of it, is not computed.
          OSError: a file cannot be read.
        """
        config = read_json(path, "config.json")
        if config is None:
            raise CheckpointError(f"{quote(path.name)} is a folder without a config.json")
        family, form = _family(config)
        read = Config(_text_part(config, form))
        described = form.describe(read)
        read.finish()
        shards = open_shards(path)
        try:
            stored = _stored(shards, form, described)
            if "token_embd.weight" not in stored:
                raise UnsupportedModel("tensor 'model.embed_tokens.weight' is missing")
            settings = Settings.read(path, config)
            metadata = {
                "general.architecture": family.architecture,
                "general.name": str(config.get("_name_or_path") or _name(path)),
                **{f"{family.architecture}.{key}": value for key, value in described.metadata.items()},
                **tokenizer_metadata(path, settings, stored["token_embd.weight"].info.shape[0]),
            }
        except BaseException:
            for shard in shards:
                shard.file.close()
            raise
        tensors = {name: one.info for name, one in stored.items()}
        for name, values in described.tensors.items():
            tensors[name] = TensorInfo(name, values.shape, TensorType.F32, 0, values.nbytes)
        return cls(
            path,
            sum(shard.file.size for shard in shards),
            MappingProxyType(metadata),
            MappingProxyType(tensors),
            tuple(shards),
            stored,
            described.tensors,
        )

    @property
    def name(self) -> str:
        """Name of the model: the folder's, or in the cache of downloads the repository's."""
        return _name(self.path)

    def close(self) -> None:
        """Lets go of the files."""
        for shard in self._shards:
            shard.file.close()

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def dequantize(self, name: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """A tensor as floats, in the order and with the offset that its GGUF file has.

        Raises:
          GGUFError: there is no such tensor, or a file was closed or changed.
        """
        if name in self._made:
            return self._made[name].astype(dtype)
        if name not in self._stored:
            raise GGUFError(f"{self.path.name} has no tensor {quote(name)}")
        one = self._stored[name]
        info = one.info
        read = [self._read(shard, part) for shard, part in one.parts]
        out = read[0] if len(read) == 1 else np.concatenate(read)
        if one.heads:
            halves = out.reshape(one.heads, 2, len(out) // one.heads // 2, -1)
            out = halves.swapaxes(1, 2).reshape(out.shape)
        if one.plus_one:
            out = out + np.float32(1.0)
        return out.reshape(info.shape).astype(dtype, copy=False)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """No tensor is used as it lies in a file; raises GGUFError."""
        raise GGUFError(f"tensor {quote(name)} has no blocks of bytes")

    def release(self, name: str) -> None:
        """Takes a tensor out of this process's memory until it is looked at again."""
        for shard, part in self._stored[name].parts if name in self._stored else ():
            self._shards[shard].file.release(part.offset, part.nbytes)

    def _read(self, shard: int, info: TensorInfo) -> npt.NDArray[np.float32]:
        """A stored tensor, as a matrix of rows."""
        raw = np.frombuffer(self._shards[shard].file.view(), np.uint8, info.nbytes, info.offset)
        packed = raw.reshape(info.shape[0], -1)
        out = np.empty((info.shape[0], int(np.prod(info.shape[1:], dtype=np.int64))), np.float32)
        for start in range(0, len(out), _ROWS):
            out[start : start + _ROWS] = _floats(info.ggml_type, packed[start : start + _ROWS])
        return out

    def has_nibbles(self, name: str) -> bool:
        """No tensor is a matrix of 4-bit codes."""
        return False

    def nibbles(self, name: str) -> Nibbles:
        """There are none; raises GGUFError."""
        raise GGUFError(f"tensor {quote(name)} has no 4-bit codes")

    def fingerprint(self) -> str:
        """SHA-256 of the files that make the model, with their names; computed once. Raises GGUFError, OSError."""
        if not self._digest:
            digest = hashlib.sha256()
            for name in _TEXTS:
                if (self.path / name).exists():
                    data = read_bytes(self.path, name)
                    digest.update(f"{name}\0{len(data)}\0".encode())
                    digest.update(data)
            for shard in self._shards:
                digest.update(f"{shard.name}\0{shard.file.size}\0".encode())
                with memoryview(shard.file.view()) as view:
                    for start in range(0, shard.file.size, 4 << 20):
                        digest.update(view[start : start + (4 << 20)])
                shard.file.view()
            self._digest.append(digest.hexdigest())
        return self._digest[0]


def _name(path: Path) -> str:
    """A folder's name; in the cache of downloads it is a commit, and the repository's name two folders up."""
    path = path.absolute()
    found = _CACHED.fullmatch(path.parent.parent.name) if path.parent.name == "snapshots" else None
    return found["name"] if found else path.name


def _family(config: Mapping[str, Any]) -> tuple[Family, Checkpoint]:
    """The family of a config.json, and how its folders look."""
    classes = config.get("architectures")
    asked = [one for one in classes if isinstance(one, str)] if isinstance(classes, list) else []
    known: list[str] = []
    for family in FAMILIES.values():
        if family.checkpoint is not None:
            if any(one in family.checkpoint.classes for one in asked):
                return family, family.checkpoint
            known += family.checkpoint.classes
    raise UnsupportedModel(
        f"config.json: architectures {str(asked)[:80]} are not supported (known: {', '.join(sorted(known))})"
    )


def _text_part(config: Mapping[str, Any], form: Checkpoint) -> Mapping[str, Any]:
    """The text model's part of a configuration."""
    part = None if form.text is None else config.get(form.text)
    if part is None:
        return config
    if not isinstance(part, dict):
        raise CheckpointError(f"config.json: '{form.text}' is no object")
    kept = {key: config[key] for key in ("quantization_config", "tie_word_embeddings") if key in config}
    return kept | part


def _stored(shards: list[Shard], form: Checkpoint, described: Described) -> dict[str, _Stored]:
    """The tensors by their GGUF names; raises UnsupportedModel for one that is not understood."""
    found: dict[str, _Stored] = {}
    heads = {
        "attn_q": described.metadata["attention.head_count"],
        "attn_k": described.metadata["attention.head_count_kv"],
    }
    has_head = False
    stacks: dict[str, dict[int, tuple[int, TensorInfo]]] = {}
    for number, shard in enumerate(shards):
        for name, info in shard.tensors.items():
            if name.endswith(".rotary_emb.inv_freq"):  # a table that is made anew
                continue
            if name.startswith(form.beside):
                found[f"v.{name}"] = _Stored(info, ((number, info),))
                continue
            part, target, place = _target(name, form)
            if target is None:
                raise UnsupportedModel(f"{shard.name}: tensor {quote(name)} is not understood")
            if part == "output":
                has_head = True
                if described.tied:  # a copy of the embeddings
                    continue
            if place is not None:
                if place in stacks.setdefault(target, {}):
                    raise CheckpointError(f"{shard.name}: tensor {quote(name)} is there under another name as well")
                stacks[target][place] = number, info
                continue
            if target in found:
                raise CheckpointError(f"{shard.name}: tensor {quote(name)} is there under another name as well")
            rotated = heads[part] if part in form.interleaved else 0
            if rotated and (rotated < 0 or info.shape[0] % (2 * rotated)):
                raise UnsupportedModel(
                    f"{shard.name}: tensor {quote(name)} has {info.shape[0]} rows for {rotated} heads"
                )
            plus_one = form.norms_plus_one and part.endswith("_norm")
            shape = info.shape[1:] if info.shape[0] == 1 and len(info.shape) == 2 else info.shape
            told = TensorInfo(target, shape, info.ggml_type, info.offset, info.nbytes)
            found[target] = _Stored(told, ((number, info),), rotated, plus_one)
    found |= {target: _stacked(target, parts) for target, parts in stacks.items()}
    if not has_head and not described.tied:
        raise UnsupportedModel("tensor 'lm_head.weight' is missing, and config.json does not say tie_word_embeddings")
    return found


def _target(name: str, form: Checkpoint) -> tuple[str, str | None, int | None]:
    """A tensor's part, its whole name in GGUF or None, and its place where it is one of a stack."""
    match = _NAME.fullmatch(name)
    if match is None:
        return "", None, None
    if match["root"] is not None:
        part = "output" if match["root"] == "lm_head" else _ROOT.get(match["root"], "")
        return part, f"{part}.{match['kind']}" if part else None, None
    inside, number = match["part"], _NUMBER.search(match["part"])
    if number is not None:
        inside = f"{inside[: number.start()]}.*{inside[number.end() :]}"
    part = form.layer.get(inside, "")
    place = None if number is None else int(number[1])
    return part, f"blk.{int(match['layer'])}.{part}.{match['kind']}" if part else None, place


def _stacked(target: str, parts: Mapping[int, tuple[int, TensorInfo]]) -> _Stored:
    """Tensors that GGUF has as one; raises UnsupportedModel where one is missing or unlike the others."""
    ordered = [parts[place] for place in sorted(parts)]
    first = ordered[0][1]
    if sorted(parts) != list(range(len(parts))):
        raise UnsupportedModel(f"of the tensors that make '{target}' some are missing: there are {sorted(parts)[:8]}")
    if any(info.shape != first.shape for _, info in ordered):
        raise UnsupportedModel(f"the tensors that make '{target}' differ in their shapes")
    size = sum(info.nbytes for _, info in ordered)
    return _Stored(TensorInfo(target, (len(ordered), *first.shape), first.ggml_type, 0, size), tuple(ordered))


def _floats(kind: TensorType, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Rows of bytes as rows of float32."""
    match kind:
        case TensorType.F32:
            return packed.view("<f4")
        case TensorType.F16:
            return packed.view("<f2").astype(np.float32)
    return (packed.view("<u2").astype(np.uint32) << 16).view(np.float32)
