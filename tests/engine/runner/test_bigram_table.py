"""Bigram tables: what is counted, what a file is trusted with, and what drafts make of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine import Engine
from atlas_jax.engine.fit_bigrams import user_turn, write_answers
from atlas_jax.engine.runner import bigram_table
from atlas_jax.engine.runner.bigram_table import TableError
from atlas_jax.kernels.speculative_drafter import NONE
from tests.engine.offline import ask, request

VOCAB = 20
tokens = st.integers(0, VOCAB - 1)


@given(st.lists(st.tuples(tokens, st.integers(0, 4)), max_size=60))
def test_the_most_frequent_successor_is_kept(pairs: list[tuple[int, int]]) -> None:
    table = bigram_table.most_frequent(np.asarray(pairs, np.int32).reshape(-1, 2), VOCAB)
    for token in range(VOCAB):
        seen = Counter(following for first, following in pairs if first == token)
        assert table[token] == min(seen, key=lambda following: (-seen[following], following), default=NONE)


@given(st.lists(st.integers(NONE, VOCAB - 1), min_size=VOCAB, max_size=VOCAB))
def test_a_table_survives_its_file(table: list[int]) -> None:
    data = bigram_table.encode("model", np.asarray(table, np.int32))
    assert bigram_table.decode(data, "model", VOCAB).tolist() == table


def test_the_file_of_another_model_is_refused() -> None:
    data = bigram_table.encode("model", np.full((VOCAB,), VOCAB - 1, np.int32))
    with pytest.raises(TableError, match="another model"):
        bigram_table.decode(data, "other", VOCAB)
    with pytest.raises(TableError, match=f"below {VOCAB - 1}"):
        bigram_table.decode(data, "model", VOCAB - 1)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_file_is_refused_or_holds_tokens_alone(data: st.DataObject) -> None:
    file = bytearray(bigram_table.encode("model", np.arange(VOCAB, dtype=np.int32)))
    for place in data.draw(st.lists(st.integers(0, len(file) - 1), min_size=1, max_size=4)):
        file[place] = data.draw(st.integers(0, 255))
    file = file[: data.draw(st.integers(0, len(file)) | st.just(len(file)))]
    try:
        table = bigram_table.decode(bytes(file), "model", VOCAB)
    except TableError:
        return
    assert table.shape == (VOCAB,)
    assert ((table >= NONE) & (table < VOCAB)).all()


@pytest.mark.usefixtures("always_drafting")
def test_an_answer_like_what_was_counted_takes_fewer_steps(
    opened: Callable[..., Any], engines: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's tokens are all different, so the lookup has nothing to say until the answer repeats itself."""
    asked = request(list(range(5, 45)), 12)
    plain, drafted_by_table = ask(engines("int8 undrafted"), asked), ask(engines("int8"), asked)
    whole = np.asarray([asked.prompt[-1], *plain.tokens], np.int32)
    table = bigram_table.most_frequent(np.stack([whole[:-1], whole[1:]], axis=1), engines("int8").model.vocab_size)
    monkeypatch.setattr(bigram_table, "find", lambda cache, fingerprint, vocab: table)
    with opened() as engine:
        drafted = ask(engine, asked)
    assert drafted.infos == drafted_by_table.infos == plain.infos
    assert drafted.end.accepted_tokens > drafted_by_table.end.accepted_tokens


def test_the_model_asks_and_answers_itself(engines: Callable[[str], Engine]) -> None:
    engine = engines("int8")
    before, after = user_turn(engine)
    text = engine.tokenizer.encode("What is it?", add_special=False, parse_special=False)
    assert [*before, *text, *after] == engine.render_chat([{"role": "user", "content": "What is it?"}])
    pairs = write_answers(engine, 20, seed=3, together=24)
    assert len(pairs) >= 20
    assert ((pairs >= 0) & (pairs < engine.model.vocab_size)).all()
    assert (pairs == write_answers(engine, 20, seed=3, together=24)).all()
    assert after[-1] in pairs[:, 0]
