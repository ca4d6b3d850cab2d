"""Tokenizers against llama.cpp, and what llama.cpp does not promise: errors, bounds, streaming."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.engine.api import Tokenizer as TokenizerProtocol
from atlas_jax.gguf import GGUFError, GGUFFile, StreamDecoder, Tokenizer
from atlas_jax.gguf._bpe import BYTE_ALPHABET
from atlas_jax.gguf._pretokenizers import _FAMILIES
from atlas_jax.gguf._spm import ScoreMerger

Golden = Callable[[str], dict[str, Any]]
FromJson = Callable[[Mapping[str, Any]], dict[str, Any]]


def load(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_metadata(file.metadata)


@pytest.fixture(scope="module")
def smollm(smollm_path: Path) -> Tokenizer:
    return load(smollm_path)


@pytest.fixture(scope="module")
def gemma(gemma_path: Path) -> Tokenizer:
    return load(gemma_path)


@pytest.fixture(scope="module")
def qwen(qwen_path: Path) -> Tokenizer:
    return load(qwen_path)


@pytest.fixture
def small(byte_level: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata({**byte_level, "tokenizer.ggml.pre": "gpt-2"})


def assert_agrees(tokenizer: Tokenizer, texts: list[str], golden: dict[str, Any]) -> None:
    for text, plain, special in zip(texts, golden["plain"], golden["special"], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == plain, text
        assert tokenizer.encode(text, add_special=True, parse_special=True) == special, text
    assert sorted(tokenizer.eog_ids) == golden["end_ids"]
    pieces = hashlib.sha256()
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        pieces.update(len(piece).to_bytes(4, "little") + piece)
    assert pieces.hexdigest() == golden["pieces_sha256"]


def changed(metadata: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Metadata with keys of `tokenizer.ggml` set, or removed with None."""
    result = dict(metadata)
    for name, value in changes.items():
        result[f"tokenizer.ggml.{name}"] = value
    return {key: value for key, value in result.items() if value is not None}


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "fixture"),
    [("smollm2", "smollm"), ("gemma3", "gemma"), pytest.param("qwen2", "qwen", marks=pytest.mark.slow)],
)
def test_agrees_with_llama_cpp(name: str, fixture: str, golden: Golden, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(fixture)
    assert_agrees(tokenizer, golden("strings")["strings"], golden(name))


@pytest.mark.parametrize("case", ["plain", "ties", "phi"])
def test_sentencepiece_options_agree_with_llama_cpp(case: str, golden: Golden, as_metadata: FromJson) -> None:
    data = golden("sentencepiece")
    facts = data["cases"][case]
    tokenizer = Tokenizer.from_metadata(as_metadata({**data["metadata"], **facts["metadata"]}))
    assert_agrees(tokenizer, golden("strings")["strings"][::2], facts)
    for ids, text in zip(facts["plain"], facts["decoded"], strict=True):
        assert tokenizer.decode(ids) == text
    assert isinstance(tokenizer._model.merge.__self__, ScoreMerger) == (case == "ties")  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def pre_tokenizers(golden: Golden) -> dict[str, Any]:
    return golden("pretokenizers")


OURS = [family.names.split() for family in _FAMILIES if not family.names.startswith("atlas-")]


@pytest.mark.parametrize("names", OURS, ids=[names[0] for names in OURS])
def test_pre_tokenizers_agree_with_llama_cpp(
    names: list[str], pre_tokenizers: dict[str, Any], byte_level: dict[str, Any]
) -> None:
    by_name, texts = pre_tokenizers["plain"], pre_tokenizers["strings"]
    assert len(texts) >= 300
    found = [by_name[name] for name in names]
    found = [by_name[one] if isinstance(one, str) else one for one in found]
    assert all(one == found[0] for one in found), "names that cut alike"
    tokenizer = Tokenizer.from_metadata({**byte_level, "tokenizer.ggml.pre": names[0]})
    for text, ids in zip(texts, found[0], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text[:200]


def test_no_name_goes_unchecked(pre_tokenizers: dict[str, Any]) -> None:
    assert sorted(pre_tokenizers["plain"]) == sorted(chain.from_iterable(OURS))


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I've  2 dogs!\n\n x", ["I", "'ve", " ", " 2", " dogs", "!", "\n\n", " x"]),
        ("gpt-2", "'S 's", ["'", "S", " '", "s"]),
        ("smollm", "a123 45", ["a", "1", "2", "3", " ", "4", "5"]),
        ("llama3", "I'VE 12345\n  x", ["I", "'VE", " ", "123", "45", "\n", " ", " x"]),
        ("llama-v3", "\tfoo(bar) ;\r\n", ["\tfoo", "(bar", ")", " ;\r\n"]),
        ("qwen2", "x12 \n y", ["x", "1", "2", " \n", " y"]),
        ("default", "a.b 1234", ["a", ".", "b", " ", "123", "4"]),
        ("default", "x  .", ["x", "  ", "."]),
        ("tekken", "fooBar HTTPServer 12", ["foo", "Bar", " HTTPServer", " ", "1", "2"]),
        ("gpt-4o", "fooBar's 1234", ["foo", "Bar's", " ", "123", "4"]),
        ("llama3", "été\u00a0日本\u3000x", ["été", "\u00a0日本", "\u3000x"]),
        ("llama3", "\U00031350a", ["\U00031350a"]),  # a letter since Unicode 15
        # its class of signs has the Latin letters, so they are cut out of words of other letters
        ("deepseek-llm", "Hi  world!\n\n été", ["Hi", " ", " world", "!", "\n", "\n", " é", "t", "é"]),
        ("deepseek-llm", "x12345 你好，世界。 \t", ["x", "12345", " ", "你好", "，", "世界", "。", " \t"]),
        ("deepseek-llm", "ΐ Ωmega 𐐀", ["ΐ", " Ω", "mega", " 𐐀"]),
        ("deepseek-coder", "f(x):\n  12 + é你", ["f", "(", "x", "):", "\n", "  ", "1", "2", " +", " é", "你"]),
        ("deepseek-coder", "a  b", ["a", " ", " b"]),
        (
            "deepseek-v3",
            "I've 12345 {x} ~~日本語カナx\n\n",
            ["I", "'ve", " ", "123", "45", " {", "x", "}", " ~~"] + ["日本語カナ", "x", "\n\n"],
        ),
        (
            "bloom",
            "I've (12 dogs), ok.  x\u3000y",
            ["I've", " (", "12", " dogs", "),", " ok", ". ", " x", "\u3000", "y"],
        ),
        ("gpt3-finnish", "a|b…c", ["a", "|", "b", "…", "c"]),
        ("viking", "a12 b3!", ["a", "1", "2", " b", "3", "!"]),
        ("superbpe", "the cat 1234567 12 x", ["the cat ", "1", "234", "567", " ", "12", " x"]),
        ("superbpe", "123456 1234", ["123", "456", " ", "1", "234"]),
    ],
)
def test_words(pre: str, text: str, words: list[str], byte_level: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata({**byte_level, "tokenizer.ggml.pre": pre})
    assert tokenizer._model.words(text) == words  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["bert", "t5", "rwkv", "plamo2", "gemma4", "none", ""])
def test_other_kinds_of_tokenizers_are_refused_by_their_name(name: str, byte_level: dict[str, Any]) -> None:
    with pytest.raises(GGUFError, match=rf"tokenizer model '{name}' .* is not known; known are gpt2, llama"):
        Tokenizer.from_metadata({**byte_level, "tokenizer.ggml.model": name})


@pytest.mark.parametrize("name", ["gemma4", "whitespace", "sarvam-moe", "something-new"])
def test_pre_tokenizers_that_are_not_there_are_refused_by_their_name(name: str, byte_level: dict[str, Any]) -> None:
    with pytest.raises(GGUFError, match=f"pre-tokenizer '{name}' .* is not known; known are a.x-4.0"):
        Tokenizer.from_metadata({**byte_level, "tokenizer.ggml.pre": name})


def test_without_a_pre_tokenizer_the_default_is_used(byte_level: dict[str, Any]) -> None:
    named = Tokenizer.from_metadata({**byte_level, "tokenizer.ggml.pre": "default"})
    unnamed = Tokenizer.from_metadata(byte_level)
    text = "a.b 1234, don't"
    assert unnamed.encode(text, add_special=False, parse_special=False) == named.encode(
        text, add_special=False, parse_special=False
    )


def test_satisfies_the_protocol(small: Tokenizer) -> None:
    tokenizer: TokenizerProtocol = small
    assert tokenizer.vocab_size == len(small._vocab.tokens)


def test_special_tokens(small: Tokenizer) -> None:
    end = small.special_tokens["<|endoftext|>"]
    assert small.eos_id == end
    assert small.is_special(end)
    assert end in small.eog_ids
    assert small.encode("a<|endoftext|>b", add_special=False, parse_special=True)[1] == end
    plain = small.encode("a<|endoftext|>b", add_special=False, parse_special=False)
    assert end not in plain
    assert small.decode(plain) == "a<|endoftext|>b"
    ids = small.encode("a<|endoftext|>", add_special=False, parse_special=True)
    assert small.decode(ids) == "a<|endoftext|>"
    assert small.decode(ids, skip_special=True) == "a"
    assert small.token_bytes(end) == b"<|endoftext|>"


def test_control_tokens_never_come_from_merges(sentencepiece: dict[str, Any]) -> None:
    tokens = sentencepiece["tokenizer.ggml.tokens"]
    metadata = changed(
        sentencepiece,
        tokens=[*tokens, "</", "s>"],
        scores=np.append(sentencepiece["tokenizer.ggml.scores"], [-0.5, -0.25]).astype(np.float32),
        token_type=np.append(sentencepiece["tokenizer.ggml.token_type"], [1, 1]).astype(np.int32),
    )
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode("x </s>", add_special=False, parse_special=False)
    assert ids[-2:] == [len(tokens), len(tokens) + 1]
    assert not any(map(tokenizer.is_special, ids))


def test_add_special_follows_the_file(small: Tokenizer, byte_level: dict[str, Any]) -> None:
    assert small.encode("", add_special=True, parse_special=True) == []
    both = Tokenizer.from_metadata(
        {**byte_level, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    )
    assert both.encode("", add_special=True, parse_special=True) == [both.bos_id, both.eos_id]
    assert both.encode("", add_special=False, parse_special=True) == []
    assert Tokenizer.from_metadata({**byte_level, "tokenizer.ggml.pre": "llama-bpe"}).add_bos


def test_ignore_merges_takes_a_word_that_is_a_token(byte_level: dict[str, Any]) -> None:
    tokens = byte_level["tokenizer.ggml.tokens"]
    metadata = {
        **byte_level,
        "tokenizer.ggml.tokens": [*tokens, "xyzzyx"],
        "tokenizer.ggml.token_type": np.append(byte_level["tokenizer.ggml.token_type"], 1).astype(np.int32),
    }
    with_rule = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.pre": "llama-bpe"})
    without = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.pre": "dbrx"})
    assert with_rule.encode("xyzzyx", add_special=False, parse_special=False) == [len(tokens)]
    assert len(without.encode("xyzzyx", add_special=False, parse_special=False)) > 1


def test_a_missing_byte_blocks_merges_and_leaves_nothing(byte_level: dict[str, Any]) -> None:
    tokens = list(byte_level["tokenizer.ggml.tokens"])
    tokens[tokens.index("Ą")] = "gone"  # byte 4
    pair = byte_level["tokenizer.ggml.merges"][0].replace(" ", "")
    tokenizer = Tokenizer.from_metadata({**byte_level, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.pre": "gpt-2"})
    assert len(pair) == 2
    assert len(tokenizer.encode("==", add_special=False, parse_special=False)) == 1
    apart = tokenizer.encode("=\x04=", add_special=False, parse_special=False)
    assert [tokenizer.token_bytes(token) for token in apart] == [b"=", b"="]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"'tokenizer\.ggml\.model' is missing"),
        ({"model": "bert"}, r"tokenizer model 'bert' .* known are gpt2, llama"),
        ({"pre": "nope"}, r"pre-tokenizer 'nope' .* known are .*llama-bpe.*smollm"),
        ({"tokens": None}, r"'tokenizer\.ggml\.tokens' is missing"),
        ({"tokens": []}, "is empty"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "has the token 'a' twice, as 0 and 2"),
        ({"tokens": ["a", "b" * 5000], "token_type": None}, "token 1 of .* has 5000 characters"),
        (
            {"tokens": list(map(str, range(40000))), "token_type": np.full(40000, 3, np.int32)},
            "calls 40000 tokens special",
        ),
        (
            {"tokens": ["a" * n for n in range(1, 200)], "token_type": np.full(199, 3, np.int32)},
            "begin with one another",
        ),
        ({"token_type": np.ones(3, np.int32)}, r"'tokenizer\.ggml\.token_type' has 3 elements for"),
        ({"token_type": np.ones(3, np.float32)}, "holds float32 values"),
        ({"scores": np.full(9999, np.nan, np.float32)}, "not a number"),
        ({"merges": None}, r"'tokenizer\.ggml\.merges' is missing"),
        ({"merges": ["a b", "ab"]}, "merge 1 of .* is 'ab', not two tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is true, but .*bos_token_id names no token"),
        ({"bos_token_id": "1"}, "is of type string, expected integer"),
    ],
)
def test_errors_name_the_key(changes: dict[str, Any], message: str, byte_level: dict[str, Any]) -> None:
    with pytest.raises(GGUFError, match=message):
        Tokenizer.from_metadata(changed(byte_level, **changes))


def test_a_byte_token_must_spell_a_byte(sentencepiece: dict[str, Any]) -> None:
    tokens = ["<0xZZ>" if text == "<0x41>" else text for text in sentencepiece["tokenizer.ggml.tokens"]]
    with pytest.raises(GGUFError, match="of type byte and spelled '<0xZZ>'"):
        Tokenizer.from_metadata(changed(sentencepiece, tokens=tokens))


def test_ids_outside_the_vocabulary(small: Tokenizer) -> None:
    for token in (-1, small.vocab_size, 2**40):
        with pytest.raises(ValueError, match="is not in the vocabulary"):
            small.decode([token])
        with pytest.raises(ValueError, match="is not in the vocabulary"):
            StreamDecoder(small).push(token)
        assert not small.is_special(token)


def test_special_ids_out_of_range_are_none(byte_level: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(changed(byte_level, bos_token_id=2**32 - 1, eos_token_id=10**6))
    assert tokenizer.bos_id is None
    assert tokenizer.eos_id is None


def test_end_tokens_of_the_gpt_oss_family(byte_level: dict[str, Any]) -> None:
    extra = ["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|message|>"]
    tokens = [*byte_level["tokenizer.ggml.tokens"], *extra]
    types = np.concatenate([byte_level["tokenizer.ggml.token_type"], np.full(len(extra), 3, np.int32)])
    tokenizer = Tokenizer.from_metadata(changed(byte_level, tokens=tokens, token_type=types))
    ends = {tokenizer._vocab.tokens[token] for token in tokenizer.eog_ids}
    assert ends == {"<|return|>", "<|call|>", "<|endoftext|>"}
    assert not tokenizer.is_special(tokens.index("<|message|>"))


def test_fingerprint_covers_what_matters(byte_level: dict[str, Any]) -> None:
    base = Tokenizer.from_metadata(byte_level).fingerprint
    merges = byte_level["tokenizer.ggml.merges"]
    others = [{"pre": "qwen2"}, {"merges": merges[:-1]}, {"bos_token_id": 1}, {"add_bos_token": True}]
    prints = [Tokenizer.from_metadata(changed(byte_level, **other)).fingerprint for other in others]
    assert len({base, *prints}) == 1 + len(others)
    assert Tokenizer.from_metadata(dict(byte_level)).fingerprint == base


def test_surrogates_become_the_replacement_character(small: Tokenizer) -> None:
    ids = small.encode("a\ud800b", add_special=False, parse_special=False)
    assert small.decode(ids) == "a\ufffdb"


def test_space_prefix(sentencepiece: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece)
    ids = tokenizer.encode("the sea", add_special=True, parse_special=True)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids, skip_special=True) == "the sea"
    assert tokenizer.decode(ids[1:]) == "the sea"
    assert tokenizer.decode(ids[1:], starts_text=False) == " the sea"
    after = tokenizer.encode("<s>the", add_special=False, parse_special=True)
    assert tokenizer.decode(after) == "<s> the"


def test_stream_decoder_waits_for_whole_characters(small: Tokenizer) -> None:
    def byte_ids(data: bytes) -> list[int]:
        return [small._vocab.index[BYTE_ALPHABET[byte]] for byte in data]

    stream = StreamDecoder(small)
    assert [stream.push(token) for token in byte_ids("é😀".encode())] == ["", "é", "", "", "", "😀"]
    assert stream.flush() == ""
    assert [stream.push(token) for token in byte_ids(b"\xf0\x9fa\xff\xc3")] == ["", "", "\ufffda", "\ufffd", ""]
    assert stream.flush() == "\ufffd"


def test_threads_get_the_same_ids(small: Tokenizer, golden: Golden) -> None:
    texts = golden("strings")["strings"]
    expected = [small.encode(text, add_special=False, parse_special=True) for text in texts]
    failures: list[str] = []

    def work(seed: int) -> None:
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        for index in order:
            ids = small.encode(texts[index], add_special=False, parse_special=True)
            if ids != expected[index] or small.decode(ids) is None:
                failures.append(texts[index])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


LONG = {
    "one letter": "a",
    "spaces": " ",
    "line feeds": "\n",
    "digits": "7",
    "signs": "!",
    "two blanks": " \t",
    "letters": "abcdefghijklmnopqrstuvwxyz",
    "special": "<|endoftext|>",
    "almost special": "<|endoftext",
    "ideographs": "日本語漢字",
}


@pytest.mark.parametrize("unit", LONG.values(), ids=LONG.keys())
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "ties"])
def test_long_words_take_no_quadratic_time(kind: str, unit: str, golden: Golden, as_metadata: FromJson) -> None:
    data = golden("pretokenizers" if kind == "byte level" else "sentencepiece")
    case = {"byte level": {"tokenizer.ggml.pre": "llama-bpe"}, "sentencepiece": {}}
    changes = case[kind] if kind in case else data["cases"]["ties"]["metadata"]
    tokenizer = Tokenizer.from_metadata(as_metadata({**data["metadata"], **changes}))
    text = (unit * (200_000 // len(unit) + 1))[:200_000]
    start = time.process_time()
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    # A quadratic algorithm needs minutes; the slowest of these needs a second.
    assert time.process_time() - start < 15
    assert ids
    assert kind != "byte level" or tokenizer.decode(ids) == text


@pytest.mark.model
def test_a_word_of_a_million_letters(gemma: Tokenizer, smollm: Tokenizer) -> None:
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
    for tokenizer in (gemma, smollm):
        start = time.process_time()
        assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text
        assert time.process_time() - start < 15


@pytest.mark.model
def test_loads_fast(smollm_path: Path, gemma_path: Path) -> None:
    for path, limit in ((smollm_path, 3), (gemma_path, 10)):
        start = time.process_time()
        load(path)
        assert time.process_time() - start < limit
