"""The tokenizer of a GGUF model: text to ids and back, as llama.cpp does it for the same file."""

from __future__ import annotations

import codecs
import hashlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from gguf.constants import Keys, TokenType

from atlas_jax.gguf._bpe import BytePairMerger, from_byte_level, parse_merges, to_byte_level
from atlas_jax.gguf._header import GGUFError, quote
from atlas_jax.gguf._metadata import get, require
from atlas_jax.gguf._pretokenizers import PreTokenizer, pretokenizer
from atlas_jax.gguf._special import SpecialSplitter
from atlas_jax.gguf._spm import SentencePieceModel
from atlas_jax.gguf._vocab import Vocabulary, load_vocabulary

_Key = Keys.Tokenizer
NORMALIZER = "tokenizer.atlas.normalizer"
"""What is done to a text before it is cut, where a folder's description says so; GGUF has no key for it. Known is `nfc`."""

_BYTE_TEXT = re.compile("<0x[0-9A-Fa-f]{2}>")
# Role markers that older files call user-defined, which would let any text write them.
_LOOKS_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>|<(start|end)_of_turn>|\[/?(INST|SYSTEM_PROMPT)\]", re.DOTALL)


class _TextModel(Protocol):
    """Tokenises text without special tokens, and spells ordinary tokens."""

    def words(self, text: str) -> list[str]:
        """Parts of a text that can be merged alone."""

    @property
    def merge(self) -> Callable[[Sequence[str]], Mapping[str, list[int]]]:
        """Gives the ids of each of some different words."""

    def spell(self, token: str) -> bytes: ...


class ByteLevelModel:
    """Cuts and merges plain text with a byte-level vocabulary (`gpt2`).

    Attributes:
      words: cuts a text into words.
      merge: ids of each of some words.
    """

    def __init__(
        self, vocab: Vocabulary, words: PreTokenizer, merges: Sequence[str], *, composed: bool = False
    ) -> None:
        """Builds the merges.

        Args:
          composed: a text is put into Unicode's normal form C first.
        """
        ids = vocab.visible()
        merger = BytePairMerger(
            ids,
            parse_merges(merges, ids),
            size=len(vocab.tokens),
            fallbacks={},
            ignore_merges=words.ignore_merges,
            spell=to_byte_level,
        )
        self.words = (lambda text: words.split(unicodedata.normalize("NFC", text))) if composed else words.split
        self.merge = merger.merge

    def spell(self, token: str) -> bytes:
        """The bytes an ordinary token stands for."""
        return from_byte_level(token)


class Tokenizer:
    """Converts between text and token ids; safe to use from several threads.

    Attributes:
      vocab_size: number of tokens in the file.
      bos_id, eos_id: or None.
      add_bos, add_eos: what `add_special` adds.
      eog_ids: tokens that end a generation.
      special_tokens: text → id of the control and unknown tokens.
      control_tokens: those, and user-defined ones that look like control tokens; `encode_parts` finds none of them.
      fingerprint: SHA-256 of everything the tokenizer was made from.
    """

    def __init__(self, vocab: Vocabulary, model: _TextModel, fingerprint: str) -> None:
        """Use `Tokenizer.from_metadata`."""
        self.vocab_size = len(vocab.tokens)
        self.bos_id = vocab.bos_id
        self.eos_id = vocab.eos_id
        self.add_bos = vocab.add_bos
        self.add_eos = vocab.add_eos
        self.eog_ids = vocab.eog_ids
        self.fingerprint = fingerprint
        special = {vocab.tokens[token]: token for token in vocab.of_type(TokenType.CONTROL, TokenType.UNKNOWN)}
        self.special_tokens: Mapping[str, int] = MappingProxyType(special)
        self._vocab = vocab
        self._model = model
        self._special_ids = frozenset(special.values())
        self._types = bytes(vocab.types.astype(np.uint8))
        self._spelled: list[bytes | None] = [None] * self.vocab_size
        user = {vocab.tokens[token]: token for token in vocab.of_type(TokenType.USER_DEFINED)}
        harmless = {text: token for text, token in user.items() if not _LOOKS_CONTROL.fullmatch(text)}
        control = {**special, **{text: token for text, token in user.items() if text not in harmless}}
        self.control_tokens: Mapping[str, int] = MappingProxyType(control)
        self._all = SpecialSplitter(special | user, vocab.rstrip_ids)
        self._user = SpecialSplitter(user, vocab.rstrip_ids)
        self._plain = SpecialSplitter(harmless, vocab.rstrip_ids)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Builds the tokenizer that a file's metadata describes.

        Raises:
          GGUFError: the model or pre-tokenizer is not known, or a key is missing or damaged.
        """
        name = require(metadata, _Key.MODEL, str)
        pre = get(metadata, _Key.PRE, str) or ""
        composed = get(metadata, NORMALIZER, str) == "nfc"
        merges: list[str] = []
        model: _TextModel
        if name == "llama":
            vocab = load_vocabulary(metadata, sentencepiece=True, add_bos=True)
            model = SentencePieceModel(vocab)
        elif name == "gpt2":
            words = pretokenizer(pre)
            vocab = load_vocabulary(metadata, sentencepiece=False, add_bos=words.add_bos)
            merges = require(metadata, _Key.MERGES, list)
            model = ByteLevelModel(vocab, words, merges, composed=composed)
        else:
            raise GGUFError(f"tokenizer model {quote(name)} ({_Key.MODEL}) is not known; known are gpt2, llama")
        for token in vocab.of_type(TokenType.BYTE):
            if not _BYTE_TEXT.fullmatch(vocab.tokens[token]):
                raise GGUFError(f"token {token} is of type byte and spelled {quote(vocab.tokens[token])}")
        return cls(vocab, model, _fingerprint(name, f"{pre} nfc" if composed else pre, vocab, merges))

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text.

        Args:
          text: surrogates are read as U+FFFD.
          add_special: put BOS before and EOS after the text if the model wants them.
          parse_special: whether the text of a control token in `text` is that token; if not it is plain text, and only
            tokens that the file calls user-defined are found.
        """
        splitter = self._all if parse_special else self._user
        ids = self._encode(splitter.split(_without_surrogates(text)))
        if add_special and self.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Token ids of a text whose control tokens are given as ids, and whose strings hold none whatever they say."""
        return self._encode(self._plain.split_all(_without_surrogates(p) if isinstance(p, str) else p for p in parts))

    def decode(self, ids: Sequence[int], *, skip_special: bool = False, starts_text: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
          skip_special: leave out control tokens.
          starts_text: the ids begin a text, so the space that a SentencePiece model may put before it is taken away.

        Raises:
          ValueError: an id is not in the vocabulary.
        """
        pieces = (self.token_bytes(token) for token in ids if not (skip_special and token in self._special_ids))
        data = b"".join(pieces)
        if starts_text and self.add_space_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for: those of its text for a special token, none for an unused one.

        Raises:
          ValueError: the id is not in the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is not in the vocabulary of {self.vocab_size}")
        data = self._spelled[token]
        if data is None:
            data = self._spelled[token] = self._spell(token)
        return data

    def is_special(self, token: int) -> bool:
        """Whether a token is a control token (or the unknown token), which is no part of the text."""
        return token in self._special_ids

    @property
    def add_space_prefix(self) -> bool:
        """Whether a space goes before a text, and before what follows a special token."""
        return self._vocab.add_space_prefix

    def _spell(self, token: int) -> bytes:
        text = self._vocab.tokens[token]
        match self._types[token]:
            case TokenType.NORMAL:
                return self._model.spell(text)
            case TokenType.CONTROL | TokenType.UNKNOWN | TokenType.USER_DEFINED:
                return text.encode()
            case TokenType.BYTE:
                return bytes.fromhex(text[3:5])
        return b""

    def _encode(self, parts: Iterable[str | int]) -> list[int]:
        # The words of all texts are merged together: texts repeat their words.
        words: list[str | int] = []
        after_special = True
        for part in parts:
            if isinstance(part, int):
                words.append(part)
            else:
                words += self._model.words(" " + part if self.add_space_prefix and after_special else part)
            after_special = isinstance(part, int)
        unique = [word for word in dict.fromkeys(words) if isinstance(word, str)]
        ids: dict[str | int, Sequence[int]] = {word: (word,) for word in words if isinstance(word, int)}
        if unique:
            ids.update(self._model.merge(unique))
        return list(chain.from_iterable(map(ids.__getitem__, words)))


class StreamDecoder:
    """Decodes tokens as they come, a complete character at a time.

    Whatever the tokens, the texts of all `push` calls and of `flush` joined are `tokenizer.decode` of all of them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = False,
        shown: Collection[int] = (),
        starts_text: bool = True,
    ) -> None:
        """Starts a text; the arguments are those of `Tokenizer.decode`, and control tokens that are not left out."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._shown = frozenset(shown)
        self._strip = starts_text and tokenizer.add_space_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that a token completes, which may be empty.

        Raises:
          ValueError: the id is not in the vocabulary.
        """
        data = self._tokenizer.token_bytes(token)
        if self._skip_special and self._tokenizer.is_special(token) and token not in self._shown:
            return ""
        if self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left of a character that never came to its end, as U+FFFD."""
        return self._decoder.decode(b"", True)


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _fingerprint(model: str, pre: str, vocab: Vocabulary, merges: Sequence[str]) -> str:
    flags = (vocab.bos_id, vocab.eos_id, vocab.unknown_id, vocab.add_bos, vocab.add_eos, vocab.add_space_prefix)
    digest = hashlib.sha256()
    for part in (
        repr((model, pre, *flags, sorted(vocab.eog_ids), sorted(vocab.rstrip_ids), len(vocab.tokens))).encode(),
        # Lengths keep two different lists of texts from having the same bytes.
        np.fromiter(map(len, vocab.tokens), np.int32, len(vocab.tokens)).astype("<i4").tobytes(),
        "".join(vocab.tokens).encode(),
        vocab.types.astype("<i4").tobytes(),
        vocab.scores.astype("<f4").tobytes(),
        "\n".join(merges).encode(),
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
