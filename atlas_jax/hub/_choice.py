"""Which files of a repository are its model: by quantisation, with every part of it, and nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?::(?P<wanted>[\w./-]{1,255}))?", re.ASCII
)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf|\.safetensors)", re.IGNORECASE)
# A quantisation in a file's name: Q4_K_M, IQ4_XS, UD-Q4_K_XL, BF16 …
_QUANTISATION = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:(?:IQ|TQ|Q)\d(?:_[0-9A-Z]{1,3})*|MXFP4(?:_MOE)?)|BF16|F16|FP16|F32|FP32)(?=$|[-._])",
    re.IGNORECASE,
)
# Taken in this order where none is named. The engine keeps 4-bit types in 5 bits, so they cost least for what they lose.
_PREFERRED = (
    *(
        "Q4_K_M",
        "Q4_K_S",
        "UD-Q4_K_XL",
        "Q4_K_L",
        "Q4_1",
        "Q4_0",
        "IQ4_NL",
        "IQ4_XS",
        "Q5_K_M",
        "Q5_K_S",
        "Q5_1",
        "Q5_0",
    ),
    *("Q6_K", "Q8_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "BF16", "F16", "F32"),
)
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_NEEDED = ("config.json", "tokenizer.json")
_BESIDE = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "chat_template.json")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MOST_NAMED = 20


class HubError(ValueError):
    """A model that cannot be had from its repository; one line for the person who asked for it."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository, and what is wanted of it.

    Attributes:
      wanted: a quantisation or a GGUF file; None leaves the choice open.
    """

    name: str
    wanted: str | None

    @classmethod
    def parse(cls, text: str) -> Repository:
        """Reads `org/name[:quantisation]`; raises HubError."""
        found = _NAME.fullmatch(text)
        if found is None or "--" in found["name"] or ".." in text:
            raise HubError(f"{text[:300]!r} is no repository: expected org/name, or org/name:Q4_K_M")
        return cls(found["name"], found["wanted"])


@dataclass(frozen=True, slots=True)
class Choice:
    """Files to fetch.

    Attributes:
      opened: what a model is opened by, beside the files' common root; "" is that folder.
    """

    files: tuple[str, ...]
    opened: str


def choose(files: Iterable[str], repository: Repository) -> Choice:
    """The files of a repository's model: those of one GGUF, else of a folder of safetensors; raises HubError."""
    names = sorted(name for name in files if _plain(name))
    models = _models(names)
    if not models:
        return _folder(names, repository)
    if repository.wanted is not None:
        key = _wanted(models, repository.name, repository.wanted)
    else:
        key = _preferred(models, repository.name)
    _check_whole(models[key], repository.name)
    return Choice(models[key], models[key][0])


def quantisation(name: str) -> str | None:
    """The quantisation that a GGUF file's name, or else its folder's, says."""
    part = _PART.fullmatch(name)
    path = PurePosixPath(part["stem"] if part else name[: -len(".gguf")])
    for text in (path.name, *(folder.name for folder in path.parents)):
        if found := _QUANTISATION.findall(text):
            label = str(found[-1]).upper()
            return {"FP16": "F16", "FP32": "F32"}.get(label, label)
    return None


def _plain(name: str) -> bool:
    """Whether a name stays below the folder it is put in."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def _models(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """GGUF models by their names without the number of a part, each with its files in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(".gguf") and not _NOT_MODELS.search(PurePosixPath(name).name):
            part = _PART.fullmatch(name)
            found.setdefault(f"{part['stem']}.gguf" if part else name, []).append(name)
    return {key: tuple(parts) for key, parts in found.items()}


def _wanted(models: Mapping[str, tuple[str, ...]], repository: str, wanted: str) -> str:
    lowered = wanted.lower()
    for key, parts in models.items():
        if lowered in (name.lower() for whole in (key, *parts) for name in (whole, PurePosixPath(whole).name)):
            return key
    by_name = _by_quantisation(models)
    for label in (wanted.upper(), f"UD-{wanted.upper()}"):
        if label in by_name:
            return _only(by_name[label], repository, label)
    raise HubError(f"{repository} has no {wanted}; it has {_listed(by_name or models)}")


def _preferred(models: Mapping[str, tuple[str, ...]], repository: str) -> str:
    if len(models) == 1:
        return next(iter(models))
    by_name = _by_quantisation(models)
    for label in _PREFERRED:
        if label in by_name:
            return _only(by_name[label], repository, label)
    raise HubError(f"{repository} has several models, say which: {repository}:NAME, of {_listed(by_name or models)}")


def _by_quantisation(models: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, parts in models.items():
        if (label := quantisation(parts[0])) is not None:
            found.setdefault(label, []).append(key)
    return found


def _only(keys: list[str], repository: str, label: str) -> str:
    if len(keys) > 1:
        raise HubError(f"{repository} has several files of {label}, say which: {repository}:FILE, of {_listed(keys)}")
    return keys[0]


def _folder(names: list[str], repository: Repository) -> Choice:
    """A model as safetensors with its configuration and tokenizer."""
    weights = [name for name in names if name == _SINGLE] or [
        name for name in names if (part := _PART.fullmatch(name)) and part["stem"] == "model"
    ]
    if not weights or any(name not in names for name in _NEEDED):
        raise HubError(
            f"{repository.name} has no model that can be served: neither a GGUF file nor config.json, tokenizer.json and "
            "model.safetensors"
        )
    if repository.wanted is not None:
        raise HubError(f"{repository.name} has no {repository.wanted}: it has safetensors, which are served whole")
    if weights != [_SINGLE]:
        _check_whole(weights, repository.name)
    beside = [name for name in (*_BESIDE, *([_INDEX] if weights != [_SINGLE] else [])) if name in names]
    return Choice((*_NEEDED, *beside, *weights), "")


def _check_whole(parts: Iterable[str], repository: str) -> None:
    """Raises HubError where parts of a model are missing."""
    numbers: set[int] = set()
    count = 0
    for name in parts:
        if (part := _PART.fullmatch(name)) is not None:
            numbers.add(int(part["number"]))
            count = int(part["count"])
    if count and (missing := sorted(set(range(1, count + 1)) - numbers)):
        raise HubError(
            f"{repository} lacks {len(missing)} of {count} parts of the model, the first is number {missing[0]}"
        )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
