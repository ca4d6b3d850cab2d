"""The vocabulary of a GGUF file: token texts, their types, the special ids, and which tokens end a generation.

The rules for special tokens are llama.cpp's (`src/llama-vocab.cpp`): many files mark them badly or not at all, so some
are known by their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys, TokenType

from atlas_jax.gguf._header import GGUFError, quote
from atlas_jax.gguf._metadata import get, require

_Key = Keys.Tokenizer

RSTRIP = "tokenizer.atlas.rstrip_token_ids"
"""Tokens that swallow the white space after them, where a folder's description says so; GGUF has no key for it."""

# Far above what is found in vocabularies; the work on a token grows with the square of its length.
_MAX_TOKEN_LENGTH = 1024
_MAX_SPECIAL = 1 << 15
# Texts that end a generation wherever they appear in a vocabulary.
END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
    *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
# Fill-in-the-middle roles a file may leave unnamed: metadata keys, texts, and whether the token ends a generation.
_FILL_IN_ROLES: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (
        (_Key.FIM_PRE_ID, _Key.PREFIX_ID),
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
        False,
    ),
    (
        (_Key.FIM_SUF_ID, _Key.SUFFIX_ID),
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
        False,
    ),
    (
        (_Key.FIM_MID_ID, _Key.MIDDLE_ID),
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
        False,
    ),
    ((_Key.FIM_PAD_ID,), "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]", True),
    ((_Key.FIM_REP_ID,), "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>", True),
    ((_Key.FIM_SEP_ID,), "<|file_sep|>", True),
)
# Parts of the gpt-oss answer format that have to be shown.
_SHOWN_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and what the file says about them.

    Attributes:
      tokens: text of each id as stored (byte-level or with U+2581 for spaces).
      types: `gguf.TokenType` of each id, 0 where the file has an unknown one.
      scores: of each id; zeros where the file has none.
      index: text → id.
      rstrip_ids: special tokens that swallow the white space after them.
    """

    tokens: list[str]
    types: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    index: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    eog_ids: frozenset[int]
    rstrip_ids: frozenset[int]

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of the given types, ascending."""
        ids: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return ids

    def visible(self) -> dict[str, int]:
        """Text → id of the tokens that a text can hold: all but control tokens and the unknown one."""
        ids = dict(self.index)
        for token in self.of_type(TokenType.CONTROL, TokenType.UNKNOWN):
            del ids[self.tokens[token]]
        return ids


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], dict[str, int]]:
    tokens = require(metadata, _Key.LIST, list)
    if not tokens:
        raise GGUFError(f"metadata key {quote(_Key.LIST)} is empty")
    if "" in tokens:
        tokens = [text or f"[EMPTY_{token}]" for token, text in enumerate(tokens)]
    index = {text: token for token, text in enumerate(tokens)}
    if len(index) != len(tokens):
        token, text = next((token, text) for token, text in enumerate(tokens) if index[text] != token)
        raise GGUFError(f"{_Key.LIST} has the token {quote(text)} twice, as {token} and {index[text]}")
    longest = max(range(len(tokens)), key=lambda token: len(tokens[token]))
    if len(tokens[longest]) > _MAX_TOKEN_LENGTH:
        raise GGUFError(f"token {longest} of {_Key.LIST} has {len(tokens[longest])} characters")
    return tokens, index


def _per_token(metadata: Mapping[str, Any], key: str, count: int, kinds: str) -> npt.NDArray[Any] | None:
    """A numeric array with one value for each token."""
    values = get(metadata, key, np.ndarray)
    if values is None:
        return None
    if values.dtype.kind not in kinds:
        raise GGUFError(f"metadata key {quote(key)} holds {values.dtype} values")
    if len(values) < count:
        raise GGUFError(f"metadata key {quote(key)} has {len(values)} elements for {count} tokens")
    return values[:count]


def _special_id(metadata: Mapping[str, Any], keys: Iterable[str], count: int, default: int | None = None) -> int | None:
    """The id under the first key that holds a valid one: files write −1 or a too large number for "none"."""
    for key in keys:
        value = get(metadata, key, int)
        if value is not None and 0 <= value < count:
            return value
    return default if default is not None and default < count else None


def _first_id(index: Mapping[str, int], texts: str) -> int | None:
    return min((index[text] for text in texts.split() if text in index), default=None)


def _end_ids(metadata: Mapping[str, Any], index: Mapping[str, int], types: npt.NDArray[np.int32]) -> set[int]:
    """End-of-generation ids known by their text; corrects `types` in place as llama.cpp does."""
    end_ids = {index[text] for text in END_TEXTS if text in index}
    control = set(end_ids)
    for keys, texts, ends in _FILL_IN_ROLES:
        named = _special_id(metadata, keys, len(types))
        token = named if named is not None else _first_id(index, texts)
        if token is None:
            continue
        if named is None:
            control.add(token)
        if ends:
            end_ids.add(token)
    types[list(control)] = TokenType.CONTROL
    types[[index[text] for text in _SHOWN_TEXTS if text in index]] = TokenType.USER_DEFINED
    return end_ids


def _drop_false_ends(end_ids: set[int], index: Mapping[str, int], types: npt.NDArray[np.int32]) -> None:
    """Two families in which a text of the list does not end a generation."""

    def has(*texts: str) -> bool:
        return any(index.get(text) in end_ids for text in texts)

    if has("<|end|>") and has("<|call|>", "<|calls|>") and has("<|return|>", "<|flush|>"):
        end_ids.discard(index["<|end|>"])
        types[index["<|end|>"]] = TokenType.USER_DEFINED
    if has("<|tool_response>") and has("</s>"):
        end_ids.discard(index["</s>"])
        types[index["</s>"]] = TokenType.NORMAL


def _rstrip_ids(metadata: Mapping[str, Any], vocab_index: Mapping[str, int], special: Iterable[int]) -> frozenset[int]:
    """Phi-3 was trained without white space after its special tokens; the file does not say so, its name does."""
    named = get(metadata, RSTRIP, np.ndarray)
    if named is not None:
        return frozenset(named.tolist())
    name = (get(metadata, Keys.General.NAME, str) or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    ids = set(special) | {vocab_index[text] for text in ("</s>",) if text in vocab_index}
    return frozenset(ids - {vocab_index.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")})


def load_vocabulary(metadata: Mapping[str, Any], *, sentencepiece: bool, add_bos: bool) -> Vocabulary:
    """Reads the vocabulary from a file's metadata.

    Args:
      sentencepiece: the model is `llama`: ids 0, 1 and 2 are the unknown, BOS and EOS tokens unless named otherwise,
        and a space goes before the text unless the file says no.
      add_bos: whether a BOS goes before a text if the file does not say.

    Raises:
      GGUFError: a key is missing, of a wrong type, or contradicts another.
    """
    tokens, index = _tokens(metadata)
    count = len(tokens)
    types = _per_token(metadata, _Key.TOKEN_TYPE, count, "iu")
    types = np.ones(count, np.int32) if types is None else types.astype(np.int32)
    types[(types < 1) | (types > max(TokenType))] = 0
    scores = _per_token(metadata, _Key.SCORES, count, "if")
    scores = np.zeros(count, np.float32) if scores is None else scores.astype(np.float32)
    if np.isnan(scores).any():
        raise GGUFError(f"metadata key {quote(_Key.SCORES)} holds a value that is not a number")

    unknown_id = _special_id(metadata, (_Key.UNK_ID,), count, 0 if sentencepiece else None)
    bos_id = _special_id(metadata, (_Key.BOS_ID,), count, 1 if sentencepiece else None)
    eos_id = _special_id(metadata, (_Key.EOS_ID,), count, 2 if sentencepiece else None)
    end_ids = _end_ids(metadata, index, types)
    end_ids.update(
        token
        for token in (
            eos_id,
            _special_id(metadata, (_Key.EOT_ID,), count),
            _special_id(metadata, (_Key.EOM_ID,), count),
        )
        if token is not None
    )
    _drop_false_ends(end_ids, index, types)

    add_bos = get(metadata, _Key.ADD_BOS, bool, add_bos)
    add_eos = get(metadata, _Key.ADD_EOS, bool, False)
    for wanted, token, add_key, id_key in (
        (add_bos, bos_id, _Key.ADD_BOS, _Key.BOS_ID),
        (add_eos, eos_id, _Key.ADD_EOS, _Key.EOS_ID),
    ):
        if wanted and token is None:
            raise GGUFError(f"{add_key} is true, but {id_key} names no token")
    special = np.flatnonzero(np.isin(types, (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN))).tolist()
    if len(special) > _MAX_SPECIAL:
        raise GGUFError(f"metadata key {quote(_Key.TOKEN_TYPE)} calls {len(special)} tokens special")
    return Vocabulary(
        tokens=tokens,
        types=types,
        scores=scores,
        index=index,
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=get(metadata, _Key.ADD_PREFIX, bool, sentencepiece),
        eog_ids=frozenset(end_ids),
        rstrip_ids=_rstrip_ids(metadata, index, special),
    )


def special_text(metadata: Mapping[str, Any], key: str) -> str:
    """The text of the token whose id is under `key`, as a chat template knows it; empty if there is none."""
    tokens = get(metadata, _Key.LIST, list) or []
    sentencepiece = get(metadata, _Key.MODEL, str) == "llama"
    default = {_Key.BOS_ID: 1, _Key.EOS_ID: 2}.get(key) if sentencepiece else None
    token = _special_id(metadata, (key,), len(tokens), default)
    return "" if token is None else tokens[token]
