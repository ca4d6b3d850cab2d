"""Tokenizers on any text and any token sequence, with the small vocabularies of the golden files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.gguf import StreamDecoder, Tokenizer
from atlas_jax.gguf._special import SpecialSplitter
from atlas_jax.gguf._spm import ScoreMerger

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"


def metadata_of(name: str, **changes: Any) -> dict[str, Any]:
    values = {**json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))["metadata"], **changes}
    arrays = {"tokenizer.ggml.token_type": np.int32, "tokenizer.ggml.scores": np.float32}
    return {key: np.array(value, arrays[key]) if key in arrays else value for key, value in values.items()}


BYTE_LEVEL = {
    pre: Tokenizer.from_metadata(metadata_of("pretokenizers", **{"tokenizer.ggml.pre": pre}))
    for pre in (
        "gpt-2",
        "smollm",
        "llama-bpe",
        "qwen2",
        "tekken",
        "default",
        "deepseek-llm",
        "deepseek-v3",
        "viking",
        "superbpe",
    )
}
# Its token of three spaces is the user's own, which is spelled with the signs it is stored with; here it is ordinary.
SENTENCEPIECE = metadata_of("sentencepiece")
SENTENCEPIECE["tokenizer.ggml.token_type"][SENTENCEPIECE["tokenizer.ggml.tokens"].index("▁▁▁")] = 1
SPACED = Tokenizer.from_metadata(SENTENCEPIECE)
UNSPACED = Tokenizer.from_metadata({**SENTENCEPIECE, "tokenizer.ggml.add_space_prefix": False})

texts = st.text(max_size=60) | st.text("ab <|>/ \n\t1!'▁sé日", max_size=60)
names = st.sampled_from(sorted(BYTE_LEVEL))


@settings(max_examples=300, deadline=None)
@given(names, texts)
def test_byte_level_bpe_gives_the_text_back(pre: str, text: str) -> None:
    tokenizer = BYTE_LEVEL[pre]
    for parse_special in (False, True):
        ids = tokenizer.encode(text, add_special=False, parse_special=parse_special)
        assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(names, texts)
def test_words_joined_are_the_text(pre: str, text: str) -> None:
    words = BYTE_LEVEL[pre]._model.words(text)
    assert "".join(words) == text
    assert all(words)


@settings(max_examples=300, deadline=None)
@given(texts.filter(lambda text: not any(special in text for special in ("▁", "<ud>", "<ab>", "<abc", "\n\n"))))
def test_sentencepiece_gives_the_text_back(text: str) -> None:
    for tokenizer in (SPACED, UNSPACED):
        ids = tokenizer.encode(text, add_special=True, parse_special=False)
        assert tokenizer.decode(ids, skip_special=True) == text


@settings(max_examples=300, deadline=None)
@given(texts)
def test_rank_ordered_merging_is_score_ordered_merging(text: str) -> None:
    """The claim at the top of `_spm`: without equal scores both give the same tokens."""
    vocab = UNSPACED._vocab
    hidden = set(UNSPACED.special_tokens.values())
    ids = {token: index for token, index in vocab.index.items() if index not in hidden}
    scores = {
        text: float(vocab.scores[index])
        for text, index in ids.items()
        if len(text) > 1 and vocab.types[index] in (1, 4) and (vocab.types[index] == 1 or "▁" in text)
    }
    heap = ScoreMerger(scores, ids, (0,))
    words = list(dict.fromkeys(UNSPACED._model.words(text)))
    assert heap.merge(words) == UNSPACED._model.merge(words)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL["llama-bpe"], SPACED, UNSPACED], ids=["bytes", "spaced", "unspaced"])
@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip_special=st.booleans(), starts_text=st.booleans())
def test_streamed_text_is_the_decoded_text(
    tokenizer: Tokenizer, data: st.DataObject, skip_special: bool, starts_text: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = StreamDecoder(tokenizer, skip_special=skip_special, starts_text=starts_text)
    pieces = [stream.push(token) for token in ids]
    whole = tokenizer.decode(ids, skip_special=skip_special, starts_text=starts_text)
    assert "".join(pieces) + stream.flush() == whole


specials = st.dictionaries(st.text("ab<>", min_size=1, max_size=4), st.integers(0, 99), min_size=1, max_size=6)


@settings(max_examples=500, deadline=None)
@given(specials, st.text("ab<> ", max_size=40))
def test_special_tokens_are_found_longest_first(tokens: dict[str, int], text: str) -> None:
    tokens = {special: token for token, special in enumerate(tokens)}
    parts: list[str | int] = [text]
    for special in sorted(tokens, key=lambda special: (-len(special), tokens[special])):
        split: list[str | int] = []
        for part in parts:
            pieces = part.split(special) if isinstance(part, str) else [part]
            for index, piece in enumerate(pieces):
                split += ([tokens[special]] if index else []) + [piece]
        parts = split
    assert SpecialSplitter(tokens).split(text) == [part for part in parts if part != ""]
