"""Offsets of log-probabilities: where in a completion's text each token begins, for every kind of vocabulary."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import Finished, Prompt, TokenInfo
from atlas_jax.engine.scheduler.detokenizer import Detokenizer, token_info
from atlas_jax.gguf import Tokenizer
from server.services.completion_response import CompletionResponseBuilder
from server.services.response_builder import Ending, Identification, Outcome, timings_of, usage_of

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"


def tokenizer(name: str, **changes: Any) -> Tokenizer:
    values = {**json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))["metadata"], **changes}
    arrays = {"tokenizer.ggml.token_type": np.int32, "tokenizer.ggml.scores": np.float32}
    return Tokenizer.from_metadata(
        {key: np.array(value, arrays[key]) if key in arrays else value for key, value in values.items()}
    )


TOKENIZERS = {
    "byte level": tokenizer("pretokenizers", **{"tokenizer.ggml.pre": "gpt-2"}),
    "byte level with a beginning": tokenizer("pretokenizers", **{"tokenizer.ggml.pre": "llama-bpe"}),
    "sentencepiece": tokenizer("sentencepiece"),
    "sentencepiece without a space": tokenizer("sentencepiece", **{"tokenizer.ggml.add_space_prefix": False}),
}
names = st.sampled_from(sorted(TOKENIZERS))
texts = st.text(max_size=30) | st.text("the sea é日😀 \n<|>ab", max_size=30)


def completion(spoken: Tokenizer, echo: str, prompt: Sequence[int], answer: Sequence[int]) -> tuple[str, list[int]]:
    """The text of a completion and the offsets of its tokens, streamed and whole."""

    def info(token: int) -> TokenInfo:
        return token_info(spoken, token, -1.0, (), ())

    def writer() -> CompletionResponseBuilder:
        return CompletionResponseBuilder(
            Identification.new("cmpl", model="m", fingerprint="f" * 12),
            echoes=[echo],
            choices=1,
            logprobs=True,
            with_usage=False,
        )

    stream = Detokenizer(spoken, (), with_tokens=True)
    deltas = [delta for token in answer if (delta := stream.push(token, info(token)))]
    deltas += [delta for delta in [stream.finish()] if delta]
    read = Prompt(tuple(map(info, prompt)))
    streamed = writer()
    chunks = [chunk for event in (read, *deltas) for chunk in streamed.chunks(0, event)]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    offsets = [at for chunk in chunks if (found := chunk.choices[0].logprobs) for at in found.text_offset]

    ended = Finished(reason="length", prompt_tokens=len(prompt), completion_tokens=len(answer), cached_tokens=0, seed=0)
    outcome = Outcome(deltas, read.tokens, ended)
    usage = usage_of({0: ended}, 1)
    whole = writer().whole([outcome], usage, Ending(timings=timings_of([ended]), usage=usage))
    assert whole.choices[0].text == text
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.text_offset == offsets
    return text, offsets


def characters(data: bytes) -> list[int]:
    """For every byte, and the end, the number of the character it is part of; what is no character is U+FFFD."""
    out: list[int] = []
    count = at = 0
    while at < len(data):
        try:
            size = len(data[at:].decode()[0].encode())
        except UnicodeDecodeError as error:
            size = len(data[at:][: error.start].decode()[0].encode()) if error.start else error.end
        out += [count] * size
        at += size
        count += 1
    return [*out, count]


def can_go_on(data: bytes) -> bool:
    """Whether some bytes more would end a character that has begun."""

    def is_character(data: bytes) -> bool:
        try:
            return len(data.decode()) == 1
        except UnicodeDecodeError:
            return False

    return any(
        is_character(data[-begun:] + more * missing)
        for begun in range(1, min(3, len(data)) + 1)
        for missing in (1, 2, 3)
        for more in (b"\x80", b"\xbf")
    )


@settings(max_examples=200, deadline=None)
@given(names, st.data())
def test_offsets_point_at_tokens_of_prompts_of_ids(name: str, data: st.DataObject) -> None:
    """Any tokens at all: bytes that begin or end inside a character, control tokens, unused ones."""
    spoken = TOKENIZERS[name]
    some = st.lists(st.integers(0, spoken.vocab_size - 1), max_size=8)
    spelled = texts.map(lambda text: spoken.encode(text, add_special=False, parse_special=False))
    tokens = st.lists(some | spelled, min_size=1, max_size=2).map(lambda lists: [one for part in lists for one in part])
    prompt, answer = data.draw(tokens.filter(bool)), data.draw(tokens)
    cut = data.draw(st.integers(0, len(prompt) - 1))
    prompt = prompt[cut:]
    echo = spoken.decode(prompt)
    text, offsets = completion(spoken, echo, prompt, answer)
    expected = []
    for part, base in ((prompt, 0), (answer, len(echo))):
        pieces = [spoken.token_bytes(one) for one in part]
        if not base and part is prompt and spoken.add_space_prefix and b"".join(pieces)[:1] == b" ":
            first = next(index for index, piece in enumerate(pieces) if piece)
            pieces[first] = pieces[first][1:]
        if part is answer:
            pieces = [b"" if spoken.is_special(one) else piece for one, piece in zip(part, pieces, strict=True)]
        of_byte = characters(b"".join(pieces))
        at = 0
        for piece in pieces:
            # what shows nothing inside a character is where the character is, for that may still go on
            inside = not piece and can_go_on(b"".join(pieces)[:at])
            expected.append(base + of_byte[at - inside])
            at += len(piece)
    assert offsets == expected
    assert text == echo + spoken.decode(answer, skip_special=True, starts_text=False)


@settings(max_examples=200, deadline=None)
@given(names, texts.filter(bool))
@example("sentencepiece", "\u2581\u2581")
@example("sentencepiece", "a\u2581b c")
def test_offsets_point_at_tokens_of_a_text(name: str, given_text: str) -> None:
    spoken = TOKENIZERS[name]
    ids = spoken.encode(given_text, add_special=True, parse_special=False)
    _, offsets = completion(spoken, given_text, ids, [])
    assert offsets == sorted(offsets)
    if name == "sentencepiece":  # reads its mark of a space as a space
        given_text = given_text.replace("\u2581", " ")
    data, of_byte, at = given_text.encode(), characters(given_text.encode()), 0
    for token, offset in zip(ids, offsets, strict=True):
        piece = spoken.token_bytes(token)
        if name == "sentencepiece":
            piece = piece.replace("\u2581".encode(), b" ")
        if token == spoken.bos_id and at == 0:
            assert offset == 0
            continue
        own = piece if data.startswith(piece, at) else piece.removeprefix(b" ")
        assert data.startswith(own, at)
        assert offset == of_byte[at]
        at += len(own)
    assert at == len(data)


@pytest.mark.parametrize(
    ("name", "text", "offsets"),
    [
        ("sentencepiece", "the sea", [0, 0, 3]),
        ("byte level with a beginning", "the sea", [0, 0, 3]),
    ],
)
def test_offsets_of_a_short_text(name: str, text: str, offsets: list[int]) -> None:
    spoken = TOKENIZERS[name]
    ids = spoken.encode(text, add_special=True, parse_special=True)
    found = completion(spoken, text, ids, [])[1]
    assert found[: len(offsets) - 1] == offsets[:-1]
    assert len(found) == len(ids)
