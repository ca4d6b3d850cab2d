"""What `atlas-jax bench` measures: which tests, in which order, and from which requests."""

from __future__ import annotations

from atlas_jax.engine import Engine, speed


def test_each_kind_is_measured_with_the_memory_and_without() -> None:
    found = speed.tests((1, 4), tokens=640, steps=8, memory=True)
    assert [(one.name, one.memory, one.steps) for one in found] == [
        ("prefill 640", False, 1),
        ("prefill 640", True, 1),
        ("decode 1", False, 8),
        ("decode 1", True, 8),
        ("decode 4", False, 8),
        ("decode 4", True, 8),
    ]
    assert not any(one.memory for one in speed.tests((1,), tokens=640, steps=8, memory=False))


def test_rounds_go_in_turns_and_the_first_warms_up(engine: Engine) -> None:
    what = [speed.Test("decode 2", 2, 20, 4, memory) for memory in (False, True)] + [
        speed.Test("prefill", 1, 20, 1, False)
    ]
    said: list[str] = []
    before = engine.stats()
    found = speed.measure(engine, what, 2, said.append)
    after = engine.stats()
    assert [one.test for one in found] == what
    assert all(len(one.values) == 2 and min(one.values) > 0 for one in found)
    assert found[0].median == sum(found[0].values) / 2
    assert len(said) == 9
    assert after.generated_tokens_total - before.generated_tokens_total == 3 * (2 * 2 * 4 + 1)
    assert after.cached_tokens_total == before.cached_tokens_total, "nothing is taken from earlier prompts"


def test_every_stream_reads_a_text_of_its_own(engine: Engine) -> None:
    texts = [tuple(tokens) for seed in (1, 2) for tokens in speed.prose(engine, 4, 300, seed)]
    assert len(set(texts)) == 8
    assert {len(text) for text in texts} == {300}
