"""One word, one meaning: words that were replaced by those of the field do not come back."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (".py", ".md", ".c", ".h", ".toml", ".yaml", ".yml", ".json")
LEFT_OUT = (
    "CHANGELOG.md",
    "tests/golden/",
    "atlas_jax/recall/texts/",
    "tests/repository/test_words.py",
    "requirements.lock",
)
REPLACED = {
    "prefill": r"\bread(s|ing)? (a|the|its|this) prompts?\b|\bpieces? of (a|the) prompt\b",
    "prefix": r"\bbeginning of (a|the|another|another's) prompt\b",
    "draft tokens": r"\bguess(es|ed)\b|\bGuess tokens\b",
    "bigram table": r"\bsuccessor tables?\b",
    "repacked, prefetched": r"\blaid out anew\b|\basked for ahead\b",
    "the memory's next-token distribution": r"\bmemory's word\b",
    "the memory is read": r"\bmemory takes part\b",
    "decaying mean": r"\btrails?\b",
    "download": r"\bbrings? (a|the|its|another) (default )?model\b",
    "haystack": r"\bhides? facts in\b|\blen(ds|t) text\b",
    "active, in flight, scheduled": r"\b(riders|flying|sitting)\b",
    "engine/scheduler": r"\bengine[./](loop|work|batch|turns|reading|output|queue|prefix|counters)\b",
    "engine/runner": r"\bengine[./](rows|trained|step|state|whole|opening|warmup|settings)\b",
    "engine/offline, engine/host_memory": r"\bengine[./](asking|resident)\b",
    "decode state, step output": r"\binit_(drawing|room)\b|\bPacked\(",
    "layer groups": r"\bmodel[./]stages\b",
    "AOT, sharding": r"\batlas_jax[./](program|placement)\b",
    "KV cache, page schedule": r"\bmodel[./](context|window)\b|\bWindowPlan\b",
    "kernels by their operation": r"\bkernels[./](heads|solve|reduce|lookup|target|native|pallas)\b",
    "server/services": r"\bservices[./](host|job|bridge|observer|texts|compat|writers)\b",
    "server/middleware, server/admission": r"\bserver[./](edge|gate)\b",
}


def texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        if name.endswith(TEXT) and not name.startswith(LEFT_OUT) and (ROOT / name).is_file():
            yield name, (ROOT / name).read_text("utf-8")


@pytest.mark.parametrize(
    ("word", "file"),
    [
        ("speculative", "atlas_jax/kernels/speculative_drafter.py"),
        ("prefill", "atlas_jax/engine/scheduler/prefill.py"),
        ("kv_cache", "atlas_jax/model/kv_cache.py"),
        ("admission", "server/admission.py"),
        ("detokenizer", "atlas_jax/engine/scheduler/detokenizer.py"),
    ],
)
def test_a_word_of_the_field_is_the_name_of_its_file(word: str, file: str) -> None:
    found = [path for package in ("atlas_jax", "server") for path in (ROOT / package).rglob(f"*{word}*.py")]
    assert ROOT / file in found
    assert len(found) <= 2, "a search must lead somewhere"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="which files belong to the project is known to git")
def test_replaced_words_do_not_come_back() -> None:
    found = [
        f"{name}:{number}: {match[0]!r} is called: {word}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        for word, pattern in REPLACED.items()
        if (match := re.search(pattern, line))
    ]
    assert not found, "\n".join(found)
