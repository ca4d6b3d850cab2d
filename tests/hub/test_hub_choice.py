"""Which files of a repository are taken, and what is said where none can be."""

from __future__ import annotations

import pytest

from atlas_jax.hub import HubError, Repository
from atlas_jax.hub._choice import choose, quantisation

SPLIT = [f"Q8_0/tiny-Q8_0-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
FILES = [
    *("README.md", "tiny-Q4_K_M.gguf", "tiny-q5_k_s.gguf", "tiny-UD-IQ2_XXS.gguf", "mmproj-tiny-f16.gguf", *SPLIT),
    *("tiny-BF16.gguf", "imatrix_Q4_0.gguf", ".gitattributes", "../../Q2_K.gguf", "/etc/Q3_K_S.gguf"),
]
FOLDER = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "README.md",
    "pytorch_model.bin",
]
SHARDS = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]


def chosen(wanted: str | None = None, files: list[str] = FILES) -> tuple[list[str], str]:
    found = choose(files, Repository("org/tiny", wanted))
    return list(found.files), found.opened


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        (None, ["tiny-Q4_K_M.gguf"]),
        ("Q4_K_M", ["tiny-Q4_K_M.gguf"]),
        ("q5_K_s", ["tiny-q5_k_s.gguf"]),
        ("Q8_0", SPLIT),
        ("bf16", ["tiny-BF16.gguf"]),
        ("IQ2_XXS", ["tiny-UD-IQ2_XXS.gguf"]),
        ("ud-iq2_xxs", ["tiny-UD-IQ2_XXS.gguf"]),
        ("tiny-q5_k_s.gguf", ["tiny-q5_k_s.gguf"]),
        ("Q8_0/tiny-Q8_0-00002-of-00003.gguf", SPLIT),
    ],
)
def test_a_quantisation_names_its_files(wanted: str | None, files: list[str]) -> None:
    assert chosen(wanted) == (files, files[0])


@pytest.mark.parametrize(
    ("files", "first"),
    [
        (["a-Q8_0.gguf", "a-Q4_0.gguf", "a-F16.gguf"], "a-Q4_0.gguf"),
        (["a-F32.gguf", "a-Q6_K.gguf"], "a-Q6_K.gguf"),
        (["model.gguf"], "model.gguf"),
        (["model.gguf", *FOLDER], "model.gguf"),
        (["Q4_K_M/model.gguf", "Q8_0/model.gguf"], "Q4_K_M/model.gguf"),
    ],
)
def test_without_one_the_smallest_that_lose_little_go_first(files: list[str], first: str) -> None:
    assert chosen(files=files)[1] == first


def test_a_folder_of_safetensors_is_taken_whole() -> None:
    assert chosen(files=FOLDER) == (["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"], "")
    sharded = [*FOLDER[:2], "model.safetensors.index.json", *SHARDS, "consolidated.safetensors"]
    assert chosen(files=sharded) == (sharded[:-1], "")


@pytest.mark.parametrize(
    ("files", "wanted", "said"),
    [
        (FILES, "Q9_K", "org/tiny has no Q9_K; it has BF16, Q4_K_M, Q5_K_S, Q8_0, UD-IQ2_XXS"),
        (FILES, "Q2_K", "org/tiny has no Q2_K; "),
        (FILES, "f16", "org/tiny has no f16; "),
        (["a.gguf", "b.gguf"], None, "org/tiny has several models, say which: org/tiny:NAME, of a.gguf, b.gguf"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "q4_0", "several files of Q4_0, say which: org/tiny:FILE, of a-Q4_0.gguf, b-"),
        (SPLIT[:2], None, "org/tiny lacks 1 of 3 parts of the model, the first is number 3"),
        ([*FOLDER[:2], SHARDS[1]], None, "org/tiny lacks 1 of 2 parts of the model, the first is number 1"),
        (FOLDER, "Q4_K_M", "org/tiny has no Q4_K_M: it has safetensors"),
        (["config.json", "pytorch_model.bin"], None, "org/tiny has no model that can be served"),
        (["mmproj.gguf"], None, "org/tiny has no model that can be served"),
        ([], None, "org/tiny has no model that can be served"),
    ],
)
def test_what_cannot_be_taken_is_said_with_what_there_is(files: list[str], wanted: str | None, said: str) -> None:
    with pytest.raises(HubError) as refused:
        chosen(wanted, files)
    assert str(refused.value).startswith(said) or said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("llama-2-7b.Q5_1.gguf", "Q5_1"),
        ("model.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("Qwen3-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("gpt-mxfp4.gguf", "MXFP4"),
        ("tiny-fp16.gguf", "F16"),
        ("Q6_K/model.gguf", "Q6_K"),
        ("ggml-model-q4_0.gguf", "Q4_0"),
        ("model.gguf", None),
        ("SmolQ4 7B.gguf", None),
    ],
)
def test_a_quantisation_is_read_from_the_name(name: str, label: str | None) -> None:
    assert quantisation(name) == label


@pytest.mark.parametrize(
    "text", ["nobody", "a/b/c", "/b", "a/", "a/b:", "a--b/c", "a/b..c", "../b", "a b/c", "https://x/a/b"]
)
def test_a_name_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(HubError, match="no repository: expected org/name"):
        Repository.parse(text)
    assert Repository.parse("Org-1/a.B_2:q4") == Repository("Org-1/a.B_2", "q4")
