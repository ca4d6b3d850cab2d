"""tokenizer.json: the same tokens as its GGUF file and as the library the file is of, and nothing that is not sure."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from atlas_jax.gguf import GGUFError, Tokenizer
from atlas_jax.model.checkpoint import CheckpointError
from atlas_jax.model.checkpoint._tokenizer import Settings, tokenizer_metadata
from tests import tiny_model
from tests.model import checkpoint_writer

ROOT = Path(__file__).parents[2]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": (checkpoint_writer.BYTES, False),
    "smollm": (checkpoint_writer.SMOLLM, False),
    "llama-bpe": (checkpoint_writer.split(LLAMA3), True),
    "dbrx": (checkpoint_writer.split(LLAMA3), False),
    "qwen2": (checkpoint_writer.split(QWEN2), False),
    "dbrx, as cl100k has it": (
        checkpoint_writer.split(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
            r"|\s+(?!\S)|\s+"
        ),
        False,
    ),
    "qwen35": (
        checkpoint_writer.split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        False,
    ),
    "tekken": (checkpoint_writer.split(CASED.replace("SUFFIX", "").replace("DIGITS", r"\p{N}")), True),
    "gpt-4o": (
        checkpoint_writer.split(
            CASED.replace("SUFFIX", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}")
        ),
        False,
    ),
    "deepseek-v3": (
        checkpoint_writer.split(
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ),
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<tool>", "  ")


def texts() -> list[str]:
    """Lines of this repository, and strings of pieces that tokenizers fall over."""
    lines = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line][:120]
    pieces = [
        *"ab Zé1٣漢字🙂\t\n'-.",
        "  ",
        "   ",
        "\r\n",
        "'ll",
        "'S",
        "123",
        "4567",
        "the memory",
        "¿qué?",
        " sé",
        "▁",
        "̈",
    ]
    source = random.Random(7)
    made = ["".join(source.choices(pieces, k=source.randint(1, 24))) for _ in range(220)]
    return ["", " ", *lines, *made]


def folder_metadata(folder: Path, file: Any, rows: int = 1 << 20, **beside: Any) -> dict[str, Any]:
    """Metadata of a tokenizer.json, with other files beside it by their names."""
    folder.mkdir(exist_ok=True)
    checkpoint_writer.write(folder / "tokenizer.json", file)
    for name, content in beside.items():
        checkpoint_writer.write(folder / f"{name}.json", content)
    return tokenizer_metadata(folder, Settings.read(folder, beside.get("config", {})), rows)


def assert_same(one: Tokenizer, other: Tokenizer, library: tokenizers.Tokenizer | None = None) -> None:
    found = texts()
    assert len(found) >= 300
    for text in found:
        wanted = one.encode(text, add_special=True, parse_special=False)
        assert other.encode(text, add_special=True, parse_special=False) == wanted, text
        if library is not None:
            plain = other.encode(text, add_special=False, parse_special=False)
            assert library.encode(text, add_special_tokens=False).ids == plain, text
        marked = text[:9] + SPECIALS[len(text) % len(SPECIALS)] + text[9:]
        for parse in (False, True):
            wanted = one.encode(marked, add_special=False, parse_special=parse)
            assert other.encode(marked, add_special=False, parse_special=parse) == wanted, marked
        assert other.decode(wanted) == one.decode(wanted)
    assert one.special_tokens == other.special_tokens
    assert [one.token_bytes(i) for i in range(one.vocab_size)] == [
        other.token_bytes(i) for i in range(other.vocab_size)
    ]


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("pairs", [False, True])
def test_byte_level_tokens_are_those_of_the_gguf_file_and_the_library(tmp_path: Path, name: str, pairs: bool) -> None:
    tokens, types, merges = tiny_model.byte_level_vocabulary()
    cut, whole = CUTS[name]
    file = checkpoint_writer.byte_level(tokens, types, merges, cut, pairs=pairs, ignore_merges=whole)
    metadata = folder_metadata(tmp_path, file)
    pre = metadata["tokenizer.ggml.pre"]
    assert pre.removeprefix("atlas-") == name.partition(",")[0]
    made = Tokenizer.from_metadata(metadata)
    gguf = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.array(types),
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    assert_same(gguf, made, tokenizers.Tokenizer.from_str(json.dumps(file)))


def test_a_text_is_composed_first_where_the_file_says_so(tmp_path: Path) -> None:
    tokens, types, merges = tiny_model.byte_level_vocabulary()
    cut = checkpoint_writer.split(QWEN2)
    file = {**checkpoint_writer.byte_level(tokens, types, merges, cut), "normalizer": {"type": "NFC"}}
    made = Tokenizer.from_metadata(folder_metadata(tmp_path, file))
    library = tokenizers.Tokenizer.from_str(json.dumps(file))
    apart = ["e\u0301te\u0301", "\u1100\u1161\u11a8", "\u212b \u2126", "q\u0323\u0307", "<|im_end|>\u0301", "\u0958"]
    for text in [*texts(), *apart]:
        assert made.encode(text, add_special=False, parse_special=True) == library.encode(text).ids, text
    one, other = (made.encode(text, add_special=False, parse_special=False) for text in ("\u00e9", "e\u0301"))
    assert one == other
    assert (
        made.fingerprint != Tokenizer.from_metadata(folder_metadata(tmp_path, file | {"normalizer": None})).fingerprint
    )
    with pytest.raises(CheckpointError, match="normalizer has a step 'NFKC' that is not supported"):
        folder_metadata(tmp_path, file | {"normalizer": {"type": "NFKC"}})


def test_tokens_that_swallow_white_space_do(tmp_path: Path) -> None:
    tokens, types, merges = tiny_model.byte_level_vocabulary()
    file = checkpoint_writer.byte_level(tokens, types, merges, checkpoint_writer.SMOLLM)
    for one in file["added_tokens"]:
        one["rstrip"] = one["content"] == "<|im_end|>"
    made = Tokenizer.from_metadata(folder_metadata(tmp_path, file))
    library = tokenizers.Tokenizer.from_str(json.dumps(file))
    for text in (
        "a<|im_end|> \n b",
        "<|im_end|>",
        "<|im_end|>  <|im_start|>  x",
        " <|im_start|> <|im_end|>\t<|im_end|> y",
    ):
        assert made.encode(text, add_special=False, parse_special=True) == library.encode(text).ids, text


def sentencepiece_vocabulary() -> tuple[list[str], list[int], list[float]]:
    """A vocabulary as SentencePiece trains one: control tokens, bytes, pieces by score, characters."""
    words = ("the", "memory", "tokens", "page", "session", "window", "again", "never", "reads", "and", "in", "that")
    pieces: dict[str, None] = {}
    for length in (2, 3, 4, 5, 6, 7, 8):
        for word in words:
            for start in range(len(word)):
                piece = f"▁{word}"[start : start + length]
                if len(piece) == length:
                    pieces[piece] = None
    characters = sorted({*"▁abcdefghijklmnopqrstuvwxyzé1.'", *"".join(pieces)})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters, "<tool>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(characters)), 4]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + len(characters))] + [-1000.0]
    return tokens, types, scores


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_sentencepiece_tokens_are_those_of_the_gguf_file(tmp_path: Path, prefix: bool, new: bool) -> None:
    tokens, types, scores = sentencepiece_vocabulary()
    file = checkpoint_writer.sentencepiece(tokens, types, scores, prefix=prefix, new=new)
    beside = {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}
    made = Tokenizer.from_metadata(folder_metadata(tmp_path, file, **beside))
    gguf = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.array(types),
            "tokenizer.ggml.scores": np.array(scores, np.float32),
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    )
    assert (made.bos_id, made.eos_id, made.add_bos, made.add_eos) == (1, 2, True, False)
    library = tokenizers.Tokenizer.from_str(json.dumps(file))
    assert_same(gguf, made)
    for text in texts():
        if text and not text.startswith(("▁", " ")):  # the library puts no space before a text that begins with one
            assert library.encode(text, add_special_tokens=False).ids == made.encode(
                text, add_special=False, parse_special=False
            ), text


def test_ends_of_a_generation_and_what_is_added(tmp_path: Path) -> None:
    tokens, types, merges = tiny_model.byte_level_vocabulary()
    tokens, types = [*tokens, "<|stop|>", "<|halt|>"], [*types, 3, 3]
    file = checkpoint_writer.byte_level(tokens, types, merges, checkpoint_writer.SMOLLM)
    end, start, turn, stop, halt = range(len(tokens) - 5, len(tokens))
    found = Tokenizer.from_metadata(
        folder_metadata(
            tmp_path / "list",
            file,
            config={"bos_token_id": start},
            generation_config={"eos_token_id": [stop, end, turn]},
        )
    )
    assert (found.bos_id, found.eos_id, found.add_bos) == (start, stop, False)
    assert found.eog_ids == {stop, end, turn}
    named = folder_metadata(
        tmp_path / "named",
        file,
        tokenizer_config={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "add_bos_token": True,
            "add_eos_token": True,
        },
        generation_config={"eos_token_id": [halt, stop], "temperature": 0.6, "repetition_penalty": 1.1, "min_p": None},
    )
    found = Tokenizer.from_metadata(named)
    assert (found.bos_id, found.eos_id, found.add_bos, found.add_eos) == (start, turn, True, True)
    assert {halt, stop, turn} <= found.eog_ids
    assert {key: value for key, value in named.items() if "sampling" in key} == {
        "general.sampling.temp": 0.6,
        "general.sampling.penalty_repeat": 1.1,
    }
    greedy = folder_metadata(tmp_path / "greedy", file, generation_config={"temperature": 0.6, "do_sample": False})
    assert not any("sampling" in key for key in greedy)


def test_tokens_past_the_embeddings_are_left_out(tmp_path: Path) -> None:
    tokens, types, merges = tiny_model.byte_level_vocabulary()
    file = checkpoint_writer.byte_level([*tokens, "<image>"], [*types, 3], merges, checkpoint_writer.SMOLLM)
    assert folder_metadata(tmp_path, file, rows=len(tokens))["tokenizer.ggml.tokens"] == tokens
    file["added_tokens"][-1]["id"] += 2
    padded = Tokenizer.from_metadata(folder_metadata(tmp_path, file))
    assert padded.vocab_size == len(tokens) + 3
    assert padded.token_bytes(len(tokens)) == b""


@pytest.mark.parametrize("where", ["jinja", "json", "list", "none"])
def test_a_chat_template_wherever_it_lies(tmp_path: Path, where: str) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    checkpoint_writer.write(tmp_path / "tokenizer_config.json", {"chat_template": named if where == "list" else "no"})
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text("yes")
    if where in ("jinja", "json"):
        checkpoint_writer.write(tmp_path / "chat_template.json", {"chat_template": "yes" if where == "json" else "no"})
    if where == "none":
        checkpoint_writer.write(tmp_path / "tokenizer_config.json", {})
    assert Settings.read(tmp_path, {}).template == (None if where == "none" else "yes")


def changed(file: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value set."""
    copy = json.loads(json.dumps(file))
    *parts, last = path.split(".")
    inner = copy
    for part in parts:
        inner = inner[part]
    inner[last] = value
    return dict(copy)


NFKC, ISOLATED = {"type": "NFKC"}, {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated"}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.type", "Unigram", "model.type is 'Unigram': BPE is read"),
        ("model.type", "WordPiece", "model.type is 'WordPiece': BPE is read"),
        ("model.vocab", [["a", 0.0]], "model: Expected `object`, got `array` - at `$.vocab`"),
        ("model.vocab", {"a": -1}, "model.vocab has ids from -1 to "),
        ("model.vocab", {"a": 1 << 40}, "model.vocab has ids from "),
        ("model.vocab", {"a": 3, "b": 3}, "model.vocab has an id twice"),
        ("model.merges", ["a b c"], "model.merges[0] is 'a b c', not two tokens"),
        ("model.merges", [["a"]], "model.merges[0] is "),
        ("model.merges", [7], "$.merges"),
        ("model.end_of_word_suffix", "</w>", "model marks the parts of words"),
        (
            "model.ignore_merges",
            True,
            "pre_tokenizer cuts a text in a way that is not known: 'Digits' then 'ByteLevel'",
        ),
        ("normalizer", NFKC, "normalizer has a step 'NFKC' that is not supported"),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [NFKC]}]},
            "a step 'NFKC'",
        ),
        ("normalizer", {"type": "Sequence"}, "normalizer is a sequence without normalizers"),
        ("pre_tokenizer", None, "pre_tokenizer cuts a text in a way that is not known"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer has a step 'Whitespace' that is not supported"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "pre_tokenizer.add_prefix_space is true"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [ISOLATED, checkpoint_writer.BYTES]},
            "not known: '\\\\d' th",
        ),
        ("added_tokens", [{"id": 3, "content": "x", "single_word": True}], "added_tokens has 'x' as single_word"),
        ("added_tokens", [{"id": -3, "content": "x"}], "model.vocab has ids from -3"),
        ("added_tokens", [{"content": "x"}], "Object missing required field `id`"),
        ("model", 3, "model: Expected `object`, got `int`"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, path: str, value: Any, said: str) -> None:
    tokens, types, merges = tiny_model.byte_level_vocabulary()
    file = checkpoint_writer.byte_level(tokens, types, merges, checkpoint_writer.SMOLLM)
    with pytest.raises(CheckpointError) as refused:
        folder_metadata(tmp_path, changed(file, path, value))
    assert str(refused.value).startswith("tokenizer.json: ")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.byte_fallback", False, "model.byte_fallback is false"),
        ("normalizer.normalizers.1", {"type": "Lowercase"}, "normalizer has a step 'Lowercase'"),
        ("pre_tokenizer", {"type": "Split", "pattern": {"String": "x"}, "behavior": "Isolated"}, "a step 'Split'"),
        ("model.merges", ["x y"], "model.merges makes 'xy', which is no token"),
    ],
)
def test_sentencepiece_with_something_more_is_refused(tmp_path: Path, path: str, value: Any, said: str) -> None:
    file = checkpoint_writer.sentencepiece(*sentencepiece_vocabulary(), prefix=False)
    file["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    if path.startswith("normalizer"):
        path = "normalizer"
        value = {"type": "Sequence", "normalizers": [*file["normalizer"]["normalizers"], value]}
    with pytest.raises(CheckpointError) as refused:
        folder_metadata(tmp_path, changed(file, path, value))
    assert said in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b'{"model":' + b"[" * 100_000])
def test_bytes_that_are_no_tokenizer_are_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(GGUFError, match=r"tokenizer\.json: "):
        tokenizer_metadata(tmp_path, Settings.read(tmp_path, {}), 10)
