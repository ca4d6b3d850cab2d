"""tokenizer.json and what lies beside it, as the `tokenizer.*` metadata that the same model's GGUF file has.

Byte-level BPE and the BPE of SentencePiece are read. Which of them it is, how a text is cut and what goes before it are read
from the file's own description; what that does not say in a form known here is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from gguf.constants import Keys, TokenType

from atlas_jax.gguf._header import MAX_STRINGS, quote
from atlas_jax.gguf._pretokenizers import pretokenizer
from atlas_jax.gguf._spm import SPACE
from atlas_jax.gguf._tokenizer import NORMALIZER
from atlas_jax.gguf._vocab import END_TEXTS, RSTRIP
from atlas_jax.model.checkpoint._files import CheckpointError, decode, read_bytes, read_json

_FILE = "tokenizer.json"
_Key, _General = Keys.Tokenizer, Keys.General
_MAX_TEMPLATE = 1 << 20

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = "ByteLevel"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# How texts are cut, step by step, and whether a word that is a token is never merged: to names of `_pretokenizers`.
_CUTS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("Digits", _GPT2), False): "smollm",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): "dbrx",
    ((_CL100K,), False): "dbrx",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    (
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ): "qwen35",
    (
        (
            rf"{_CASED}*{_LOWER}+{_SUFFIX}|{_CASED}+{_LOWER}*{_SUFFIX}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ): "atlas-gpt-4o",
    (_DEEPSEEK3, False): "deepseek-v3",
    (
        (rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
        True,
    ): "atlas-tekken",
}


class _Added(msgspec.Struct, frozen=True):
    """A token that is found in a text before anything else."""

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    rstrip: bool = False


class _Model(msgspec.Struct, frozen=True):
    """The vocabulary."""

    vocab: dict[str, int]
    merges: list[str | list[str]]
    type: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _File(msgspec.Struct, frozen=True):
    """tokenizer.json."""

    model: msgspec.Raw
    added_tokens: list[_Added] = msgspec.field(default_factory=list)
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


class _Kind(msgspec.Struct, frozen=True):
    """The part of a vocabulary that says how the rest is to be read."""

    type: str = "BPE"


@dataclass(frozen=True, slots=True)
class Settings:
    """The small files beside the tokenizer.

    Attributes:
      template: of chats, or None.
    """

    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]
    template: str | None

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> Settings:
        """Reads them; raises CheckpointError, OSError."""
        tokenizer = read_json(folder, "tokenizer_config.json") or {}
        return cls(config, tokenizer, read_json(folder, "generation_config.json") or {}, _template(folder, tokenizer))


def _template(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """The chat template: of its own file where there is one, else of tokenizer_config.json."""
    name, found = "tokenizer_config.json", tokenizer.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        name = "chat_template.jinja"
        try:
            found = read_bytes(folder, name, _MAX_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{name} is not UTF-8 (byte {error.start})") from None
    elif (beside := read_json(folder, "chat_template.json")) is not None:
        name, found = "chat_template.json", beside.get("chat_template")
    if isinstance(found, list):  # several by name
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{name}: chat_template is no text")
    return found


def tokenizer_metadata(folder: Path, settings: Settings, rows: int) -> dict[str, Any]:
    """Metadata of the tokenizer, the chat template and the recommended sampling; raises CheckpointError, OSError.

    Args:
      rows: of the embeddings; tokens that were added past them are left out.
    """
    file: _File = decode(read_bytes(folder, _FILE), _FILE, _File)
    kind: _Kind = decode(bytes(file.model), f"{_FILE}: model", _Kind)
    if kind.type != "BPE":
        raise _refused("model.type", f"is {quote(kind.type)}: BPE is read")
    model: _Model = decode(bytes(file.model), f"{_FILE}: model", _Model)
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        raise _refused("model", "marks the parts of words, which is not supported")
    added = [one for one in file.added_tokens if one.id < rows]
    for one in added:
        if one.single_word:
            raise _refused("added_tokens", f"has {quote(one.content)} as single_word, which is not supported")
    sentencepiece = _is_sentencepiece(file, model)
    tokens, types = _tokens(model, added, sentencepiece)
    found: dict[str, Any] = {_Key.LIST: tokens, _Key.TOKEN_TYPE: np.array(types, np.int32)}
    if sentencepiece:
        found |= {
            _Key.MODEL: "llama",
            _Key.PRE: "default",
            _Key.SCORES: _scores(model, tokens),
            _Key.ADD_PREFIX: _adds_prefix(file),
        }
        if model.unk_token is not None and model.unk_token in model.vocab:
            found[_Key.UNK_ID] = model.vocab[model.unk_token]
    else:
        found |= {
            _Key.MODEL: "gpt2",
            _Key.PRE: _cut(file, model),
            _Key.MERGES: [" ".join(rule) for rule in _rules(model)],
            _Key.ADD_PREFIX: False,
        }
        if _composes(file):
            found[NORMALIZER] = "nfc"
    if swallowing := [one.id for one in added if one.rstrip]:
        found[RSTRIP] = np.array(swallowing, np.int32)
    found |= _special(file, settings, {text: token for token, text in enumerate(tokens)})
    if settings.template is not None:
        found[_Key.CHAT_TEMPLATE] = settings.template
    return found | _sampling(settings.generation)


def _refused(field: str, why: str) -> CheckpointError:
    return CheckpointError(f"{_FILE}: {field} {why}")


def _steps(part: Mapping[str, Any] | None, inside: str, field: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, which may be a sequence."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield part
        return
    steps = part.get(inside)
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise _refused(field, f"is a sequence without {inside}")
    for step in steps:
        yield from _steps(step, inside, field) if step.get("type") == "Sequence" and step is not part else [step]


def _pattern(step: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The regular expression or the text of a step."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict):
        return None, None
    regex, text = pattern.get("Regex"), pattern.get("String")
    return regex if isinstance(regex, str) else None, text if isinstance(text, str) else None


def _is_sentencepiece(file: _File, model: _Model) -> bool:
    """Whether spaces are a sign in the vocabulary, with tokens for the bytes of what it has not."""
    spaces = any(
        step.get("type") == "Replace" and _pattern(step)[1] == " " and step.get("content") == SPACE
        for step in _steps(file.normalizer, "normalizers", "normalizer")
    ) or any(step.get("type") == "Metaspace" for step in _steps(file.pre_tokenizer, "pretokenizers", "pre_tokenizer"))
    if spaces and not model.byte_fallback:
        raise _refused("model.byte_fallback", "is false in a vocabulary with a sign for spaces, which is not supported")
    return spaces


def _adds_prefix(file: _File) -> bool:
    """Whether a space goes before a text; refuses whatever else would be done to it."""
    prefix = False
    for step in _steps(file.normalizer, "normalizers", "normalizer"):
        match step.get("type"):
            case "Prepend" if step.get("prepend") == SPACE:
                prefix = True
            case "Replace" if _pattern(step)[1] == " " and step.get("content") == SPACE:
                pass
            case kind:
                raise _refused("normalizer", f"has a step {quote(str(kind))} that is not supported")
    for step in _steps(file.pre_tokenizer, "pretokenizers", "pre_tokenizer"):
        match step.get("type"):
            case "Metaspace" if step.get("replacement", SPACE) == SPACE:
                prefix |= (
                    step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
                )
            case "Split" if _pattern(step)[1] == " " and step.get("behavior") == "MergedWithPrevious":
                pass  # no text has a space any more
            case kind:
                raise _refused("pre_tokenizer", f"has a step {quote(str(kind))} that is not supported")
    return prefix


def _composes(file: _File) -> bool:
    """Whether texts are put into normal form C; refuses whatever else would be done to them."""
    steps = [step.get("type") for step in _steps(file.normalizer, "normalizers", "normalizer")]
    for kind in steps:
        if kind != "NFC":
            raise _refused("normalizer", f"has a step {quote(str(kind))} that is not supported")
    return bool(steps)


def _cut(file: _File, model: _Model) -> str:
    """The name of the pre-tokenizer of a byte-level vocabulary."""
    cuts: list[str] = []
    bytes_last = False
    for step in _steps(file.pre_tokenizer, "pretokenizers", "pre_tokenizer"):
        kind, bytes_last = step.get("type"), False
        match kind:
            case "ByteLevel":
                if step.get("add_prefix_space"):
                    raise _refused("pre_tokenizer.add_prefix_space", "is true, which is not supported")
                if step.get("use_regex", True):
                    cuts.append(_GPT2)
                bytes_last = True
            case "Digits" if step.get("individual_digits"):
                cuts.append("Digits")
            case "Split" if (regex := _pattern(step)[0]) and _keeps_all(step):
                cuts.append(regex)
            case _:
                raise _refused("pre_tokenizer", f"has a step {quote(str(kind))} that is not supported")
    name = _CUTS.get((tuple(cuts), model.ignore_merges))
    if not bytes_last or name is None:
        raise _refused("pre_tokenizer", f"cuts a text in a way that is not known: {' then '.join(map(quote, cuts))}")
    assert pretokenizer(name).ignore_merges == model.ignore_merges
    return name


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a split keeps every character, in pieces that the pattern matches or leaves."""
    behavior, invert = step.get("behavior"), step.get("invert", False)
    return behavior == "Isolated" or (behavior == "Removed" and invert is True)


def _tokens(model: _Model, added: list[_Added], sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens."""
    ids = {token: text for text, token in model.vocab.items()}
    last = max([*ids, *(one.id for one in added)], default=-1)
    first = min([*ids, *(one.id for one in added)], default=0)
    if first < 0 or last >= MAX_STRINGS:
        raise _refused("model.vocab", f"has ids from {first} to {last}")
    if len(ids) != len(model.vocab):
        raise _refused("model.vocab", "has an id twice")
    tokens = [ids.get(token, f"[PAD{token}]") for token in range(last + 1)]
    types = [int(TokenType.NORMAL) if token in ids else int(TokenType.UNUSED) for token in range(last + 1)]
    if sentencepiece:
        for byte in range(256):
            token = model.vocab.get(f"<0x{byte:02X}>")
            if token is not None:
                types[token] = int(TokenType.BYTE)
    for one in added:
        # the sign for a space stands for one in the user's own tokens, which are found before there are signs
        shown = one.content.replace(SPACE, " ") if sentencepiece and not one.special else one.content
        tokens[one.id] = shown
        types[one.id] = int(TokenType.CONTROL if one.special else TokenType.USER_DEFINED)
    if sentencepiece and model.unk_token is not None and model.unk_token in model.vocab:
        types[model.vocab[model.unk_token]] = int(TokenType.UNKNOWN)
    return tokens, types


def _rules(model: _Model) -> Iterator[tuple[str, str]]:
    """The merges, each two texts: in pairs, or in older files in one text with a space between them."""
    for index, rule in enumerate(model.merges):
        parts = rule.split(" ") if isinstance(rule, str) else rule
        if len(parts) != 2 or not all(parts):
            raise _refused(f"model.merges[{index}]", f"is {quote(str(rule))}, not two tokens")
        yield parts[0], parts[1]


def _scores(model: _Model, tokens: list[str]) -> np.ndarray:
    """Scores in the order in which tokens are merged: rules are sorted by the score of what they make."""
    order: dict[str, int] = {}
    for left, right in _rules(model):
        order.setdefault(left + right, len(order))
    least = len(order)
    scores = np.full(len(tokens), -float(least + 1), np.float32)
    for text, rank in order.items():
        token = model.vocab.get(text)
        if token is None:
            raise _refused("model.merges", f"makes {quote(text)}, which is no token")
        scores[token] = -rank
    return scores


def _special(file: _File, settings: Settings, ids: Mapping[str, int]) -> dict[str, Any]:
    """Ids of the tokens that begin and end a text, and whether they are added."""
    found: dict[str, Any] = {}
    named: dict[str, int] = {}
    for name, key in (("bos", _Key.BOS_ID), ("eos", _Key.EOS_ID), ("pad", _Key.PAD_ID), ("unk", _Key.UNK_ID)):
        entry = settings.tokenizer.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        token = ids.get(text) if isinstance(text, str) else None
        if token is None and name in ("bos", "eos"):
            token = next((one for one in _ends(settings, f"{name}_token_id") if one < len(ids)), None)
        if token is not None:
            named[name] = found[key] = token
    ends = [one for one in _ends(settings, "eos_token_id") if one < len(ids) and one != named.get("eos")]
    known = {ids[text] for text in END_TEXTS if text in ids}
    further = [one for one in dict.fromkeys(ends) if one not in known]
    keys = (_Key.EOT_ID, _Key.EOM_ID)
    if len(further) > len(keys):
        raise CheckpointError(f"generation_config.json: eos_token_id names {len(ends)} tokens, too many")
    found |= dict(zip(keys, further, strict=False))
    first, last = _template_ends(file)
    for name, key, text in (("bos", _Key.ADD_BOS, first), ("eos", _Key.ADD_EOS, last)):
        said = settings.tokenizer.get(f"add_{name}_token")
        adds = said if isinstance(said, bool) else text is not None and ids.get(text) == named.get(name)
        found[key] = adds and name in named
    return found


def _ends(settings: Settings, key: str) -> list[int]:
    """Ids that generation_config.json, or else config.json, has under a key: one or several."""
    value = settings.generation.get(key, settings.config.get(key))
    values = value if isinstance(value, list) else [value]
    return [one for one in values if type(one) is int and one >= 0]


def _template_ends(file: _File) -> tuple[str | None, str | None]:
    """Texts of the special tokens that the post-processor puts first and last."""
    for step in _steps(file.post_processor, "processors", "post_processor"):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            ends = [
                one["SpecialToken"].get("id")
                if isinstance(one, dict) and isinstance(one.get("SpecialToken"), dict)
                else None
                for one in (single[0], single[-1])
            ]
            first, last = (one if isinstance(one, str) else None for one in ends)
            return first, last
    return None, None


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json recommends, where it samples at all."""
    if generation.get("do_sample") is False:
        return {}
    keys = {
        "temperature": _General.SAMPLING_TEMP,
        "top_k": _General.SAMPLING_TOP_K,
        "top_p": _General.SAMPLING_TOP_P,
        "min_p": _General.SAMPLING_MIN_P,
        "repetition_penalty": _General.SAMPLING_PENALTY_REPEAT,
    }
    return {key: generation[name] for name, key in keys.items() if generation.get(name) is not None}
