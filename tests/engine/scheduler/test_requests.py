"""One request through `Engine.submit`: how it ends, what it reports, and that nothing it does stays behind."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Delta, Event, Failed, Finished, InvalidRequest, MemoryUnavailable, Overloaded
from tests.engine.offline import PATIENCE, Answer, ask, ask_all, memory, request, words

PROMPT = words(5, 40)


def busy(engine: Engine) -> int:
    return sum(slot.busy for slot in engine.slots())


def test_usage_counts_tokens(engine: Engine) -> None:
    before = engine.stats()
    answer = ask(engine, request(PROMPT, 9))
    assert (answer.end.prompt_tokens, answer.end.completion_tokens, answer.end.reason) == (len(PROMPT), 9, "length")
    assert len(answer.tokens) == 9
    assert answer.text == engine.tokenizer.decode(answer.tokens, skip_special=True)
    after = engine.stats()
    assert after.generated_tokens_total - before.generated_tokens_total == 9
    assert after.requests_completed - before.requests_completed == 1
    assert min(answer.end.queue_seconds, answer.end.prompt_seconds, answer.end.decode_seconds) >= 0


@pytest.mark.usefixtures("always_drafting")
@pytest.mark.slow
def test_one_client_after_many_decodes_in_a_small_batch_at_once(engine: Engine) -> None:
    """Only small batches take drafts, so drafts tell the size."""
    ask_all(engine, [request(words(seed, 20), 4) for seed in range(4)])
    assert ask(engine, request(PROMPT * 3, 6)).end.drafted_tokens > 0


def test_the_gates_of_an_answers_tokens_are_what_the_memory_took_of_the_models_distribution(engine: Engine) -> None:
    """A token the memory has never seen loses the share g of its probability, and no token loses more."""
    prompt, how = words(3, 100) * 6, {"logprobs": 20}
    plain = ask(engine, request(prompt, 6, memory=memory(read=False, token_gates=True), **how))
    answer = ask(engine, request(prompt, 6, memory=memory(blend_ratio=0.95, token_gates=True), **how))
    assert [one.gate for one in plain.infos] == [0.0] * 6
    gates = [one.gate or 0.0 for one in answer.infos]
    assert answer.end.memory is not None
    assert sum(gates) / 6 == pytest.approx(answer.end.memory.blend_ratio_actual, rel=1e-5)
    assert 0.001 < gates[0] < 1
    of_model = {token: logprob for token, _, logprob in plain.infos[0].top}
    shares = [math.exp(logprob - of_model[token]) for token, _, logprob in answer.infos[0].top if token in of_model]
    assert min(shares) == pytest.approx(1 - gates[0], abs=2e-3)


@pytest.mark.parametrize("wanted", [None, 2])
def test_gates_come_where_they_are_asked_for_and_change_no_token(engine: Engine, wanted: int | None) -> None:
    prompt = words(3, 100) * 3
    before = ask(engine, request(prompt, 6, memory=memory(), logprobs=3))
    gated = ask(engine, request(prompt, 6, memory=memory(token_gates=True), logprobs=wanted))
    assert (gated.text, gated.tokens) == (before.text, before.tokens)
    assert all(one.gate is None for one in before.infos)
    assert all(one.gate is not None and len(one.top) == (wanted or 0) for one in gated.infos)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(start=st.integers(0, 10), length=st.integers(1, 4))
def test_a_stop_string_ends_the_text_before_itself(engine: Engine, start: int, length: int) -> None:
    whole = ask(engine, request(PROMPT, 24)).text
    stop = whole[start : start + length]
    answer = ask(engine, request(PROMPT, 24, stop=(stop, "never said")))
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.end.reason, answer.end.stop) == ("stop", stop)
    assert stop not in answer.text


def test_an_end_of_generation_token_ends_the_answer_and_is_not_text(engine: Engine) -> None:
    end = engine.tokenizer.eog_ids  # type: ignore[attr-defined]
    bias = dict.fromkeys(end, 60.0)
    answer = ask(engine, request(PROMPT, 9, logit_bias=bias, ignore_eos=False))
    assert (answer.end.reason, answer.text, answer.end.completion_tokens) == ("stop", "", 1)
    ignored = ask(engine, request(PROMPT, 9, logit_bias=bias))
    assert (ignored.end.reason, ignored.end.completion_tokens) == ("length", 9)


def test_a_seed_repeats_an_answer_and_is_reported(engine: Engine) -> None:
    how: dict[str, Any] = {"temperature": 1.5}
    first = ask(engine, request(PROMPT, 12, **how))
    again = ask(engine, request(PROMPT, 12, seed=first.end.seed, **how))
    other = ask(engine, request(PROMPT, 12, seed=first.end.seed + 1, **how))
    assert again.infos == first.infos
    assert other.tokens != first.tokens
    assert (again.end.seed, other.end.seed) == (first.end.seed, first.end.seed + 1)


@pytest.mark.parametrize("wanted", [None, 0, 1, 20])
def test_log_probabilities_come_as_asked(engine: Engine, wanted: int | None) -> None:
    answer = ask(engine, request(PROMPT, 5, logprobs=wanted))
    assert len(answer.infos) == (0 if wanted is None else 5)
    for info in answer.infos:
        assert len(info.top) == wanted
        assert info.logprob is not None
        assert info.logprob <= 0
        if wanted:
            assert info.top[0][0] == info.token
            assert info.top[0][2] == pytest.approx(info.logprob, abs=1e-5)
            assert [entry[2] for entry in info.top] == sorted((entry[2] for entry in info.top), reverse=True)
        assert info.data == engine.tokenizer.token_bytes(info.token)


def test_a_prompt_can_be_scored_without_an_answer(engine: Engine) -> None:
    answer = ask(engine, request(PROMPT, 0, prompt_logprobs=0))
    assert [info.token for info in answer.prompt.tokens] == PROMPT
    assert answer.prompt.tokens[0].logprob is None
    assert all(info.logprob is not None and info.logprob < 0 for info in answer.prompt.tokens[1:])
    assert (answer.text, answer.end.completion_tokens, answer.end.reason) == ("", 0, "length")


class Cancelled(Answer):
    """An answer that is cancelled as soon as it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.ended = threading.Event(), threading.Event()

    def listen(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Delta):
            self.begun.set()
        if isinstance(event, Finished | Failed):
            self.ended.set()


@pytest.mark.parametrize("with_session", [True, False])
def test_cancelling_frees_the_row_and_keeps_the_session(engine: Engine, with_session: bool) -> None:
    how = memory("cancelled" if with_session else None)
    answer = Cancelled()
    handle = engine.submit(request(PROMPT, 100_000, memory=how), answer.listen)
    assert answer.begun.wait(PATIENCE)
    assert busy(engine) == 1
    for _ in range(3):
        handle.cancel()
    assert answer.ended.wait(PATIENCE)
    assert answer.end.reason == "cancelled"
    assert busy(engine) == 0
    handle.cancel()
    follow = ask(engine, request(words(6, 10), 6, memory=how))
    if with_session:  # what was said before the end is part of the session
        said = [*PROMPT, *answer.tokens, *words(6, 10)]
        assert follow.infos == ask(engine, request(said, 6, memory=memory("not cancelled"))).infos
    else:
        assert follow.infos == ask(engine, request(words(6, 10), 6)).infos


def test_cancelling_what_waits_never_starts_it(engine: Engine) -> None:
    running, waiting = Cancelled(), Cancelled()
    first = engine.submit(request(PROMPT, 100_000, memory=memory("shared")), running.listen)
    assert running.begun.wait(PATIENCE)
    second = engine.submit(request(PROMPT, 100_000, memory=memory("shared")), waiting.listen)  # waits for the session
    second.cancel()
    assert waiting.ended.wait(PATIENCE)
    assert (waiting.end.reason, waiting.end.completion_tokens) == ("cancelled", 0)
    first.cancel()
    assert running.ended.wait(PATIENCE)


def test_a_listener_that_fails_harms_nobody_else(engine: Engine) -> None:
    failed = threading.Event()

    def listen(event: Event) -> None:
        failed.set()
        raise RuntimeError("the client is gone")

    engine.submit(request(PROMPT, 20), listen)
    answer = ask(engine, request(PROMPT, 20))
    assert failed.wait(PATIENCE)
    assert engine.alive()
    assert answer.infos == ask(engine, request(PROMPT, 20)).infos
    assert busy(engine) == 0


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (lambda: request([]), "prompt"),
        (lambda: request([-1]), "prompt"),
        (lambda: request([10**6]), "prompt"),
        (lambda: request(PROMPT, -1), "max_tokens"),
        (lambda: request(PROMPT, logprobs=21), "logprobs"),
        (lambda: request(PROMPT, logit_bias=dict.fromkeys(range(301), 1.0)), "logit_bias"),
        (lambda: request(words(1, 1024)), "prompt"),
        (lambda: request(PROMPT, memory=memory(window_size=100)), "atlas.window_size"),
        (lambda: request(PROMPT, memory=memory(window_size=512)), "atlas.window_size"),
        (lambda: request(PROMPT, memory=memory(blend_ratio=1.5)), "atlas.blend_ratio"),
        (lambda: request(PROMPT, memory=memory(polynomial_degree=4)), "atlas.polynomial_degree"),
        (lambda: request(PROMPT, memory=memory(learning_rate=0.0)), "atlas.learning_rate"),
        (lambda: request(PROMPT, memory=memory(memory_layers=11)), "atlas.memory_layers"),
        (lambda: request(PROMPT, memory=memory(omega_window=64)), "atlas.omega_window"),
        (lambda: request(PROMPT, memory=memory("s"), prompt_logprobs=1), "echo"),
    ],
)
def test_what_can_never_succeed_is_refused_at_once(engine: Engine, bad: Callable[[], Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(bad(), lambda event: None)
    assert caught.value.param == param


def test_more_layers_than_the_adapter_has_are_all_of_them(engine: Engine) -> None:
    prompt = words(8, 400)
    answers = [ask(engine, request(prompt, 6, memory=memory(memory_layers=count))) for count in (2, 3, 10)]
    assert answers[0].infos == answers[1].infos == answers[2].infos


SAMPLING: dict[str, list[Any]] = {
    "temperature": [0.0, 0.8],
    "top_k": [0, 5],
    "top_p": [1.0, 0.9],
    "typical_p": [1.0, 0.8],
    "repeat_penalty": [1.0, 1.2],
    "logprobs": [None, 0, 5],
}
MEMORY: dict[str, list[Any]] = {
    "window_size": [128, 256],
    "update_frequency": [128, 256],
    "omega_window": [256, 300, 512],
    "use_muon": [None, True, False],
    "polynomial_degree": [1, 2, 3],
    "memory_layers": [1, 2],
    "blend_ratio": [0.0, 0.5, 1.0],
    "learning_rate": [None, 0.0015],
}
mixed = st.lists(
    st.tuples(
        st.integers(1, 700),
        st.integers(0, 12),
        st.sampled_from(["plain", "memory", "session"]),
        st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SAMPLING.items()}),
        st.fixed_dictionaries({name: st.sampled_from(values) for name, values in MEMORY.items()}),
    ),
    min_size=1,
    max_size=6,
)


def test_an_idle_engine_gives_back_what_many_requests_needed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_jax.engine.scheduler.scheduler._REST_AFTER", 0.05)
    runner = engine._serving.scheduler._runner
    sizes, resize = [], runner.resize

    def spy(rows: int, pages: int, moves: dict[int, int]) -> None:
        sizes.append((rows, pages))
        resize(rows, pages, moves)

    monkeypatch.setattr(runner, "resize", spy)
    alone = ask(engine, request(PROMPT, 6))
    ask_all(engine, [request(words(20 + i, 700), 150) for i in range(4)])  # long enough that they meet
    rows, pages = max(sizes)
    assert rows > 1, "how many of them meet is up to the machine"
    assert pages == 8
    end = time.monotonic() + PATIENCE
    while (runner.rows, runner.pages) != (runner.buckets.rows[0], runner.buckets.pages[0]):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert ask(engine, request(PROMPT, 6)).infos == alone.infos


def test_nothing_compiles_once_warm(engine: Engine, compiled: list[str]) -> None:
    assert engine.warm_up(timeout=PATIENCE)
    before = len(compiled)
    count = 0

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(mixed)
    def ask_anything(requests: list[Any]) -> None:
        nonlocal count
        asked = []
        for length, answer, kind, sampling, how in requests:
            count += 1
            session = f"warm-{count % 5}-{how['window_size']}" if kind == "session" else None
            params = None if kind == "plain" else memory(session, **how)
            asked.append(request(words(count, length), answer, memory=params, **sampling))
        ask_all(engine, asked)

    ask_anything()
    for pooling in ("mean", "last"):
        asked = [request(words(length, length), 0, logprobs=None, pooling=pooling) for length in (3, 40, 300)]
        ask_all(engine, [*asked, request(PROMPT, 6)])
    engine.sessions.info("owner", None)
    assert not compiled[before:]


def test_a_hundred_requests_at_once_all_end_and_nothing_stays(engine: Engine, compiled: list[str]) -> None:
    """Half of them in sessions, all with settings drawn at random; ten would go on for long and are cancelled."""
    assert engine.warm_up(timeout=PATIENCE)
    before = len(compiled)
    rng = random.Random(0)

    def draw(choices: dict[str, list[Any]]) -> dict[str, Any]:
        return {name: rng.choice(values) for name, values in choices.items()}

    asked = []
    for number in range(100):
        how = memory(f"crowd-{number}", **draw(MEMORY)) if number % 2 else None
        tokens = 100_000 if number % 20 in (3, 7) else rng.randint(1, 8)
        asked.append(request(words(number, rng.randint(1, 300)), tokens, memory=how, **draw(SAMPLING)))
    answers = [Cancelled() for _ in asked]
    handles = [engine.submit(one, answer.listen) for one, answer in zip(asked, answers, strict=True)]
    for one, answer, handle in zip(asked, answers, handles, strict=True):
        if one.max_tokens == 100_000:
            assert answer.begun.wait(PATIENCE)
            handle.cancel()
    for one, answer in zip(asked, answers, strict=True):
        assert answer.ended.wait(PATIENCE)
        reason = "cancelled" if one.max_tokens == 100_000 else "length"
        assert answer.end.reason == reason
        if reason == "length":
            assert answer.end.completion_tokens == one.max_tokens
    assert busy(engine) == 0
    for number in range(1, 100, 2):
        engine.sessions.delete("owner", f"crowd-{number}")
    assert not compiled[before:]


def test_without_memory_the_plain_model_answers(opened: Callable[..., Any], engine: Engine) -> None:
    with opened(memory_enabled=False, adapter_path=None, max_concurrent=2, max_context=512) as plain:
        prompt = words(9, 200)
        answer, with_memory = ask(plain, request(prompt)), ask(engine, request(prompt))
        assert answer.tokens == with_memory.tokens
        with pytest.raises(MemoryUnavailable):
            plain.submit(request(prompt, memory=memory()), lambda event: None)
        plain.drain()
        with pytest.raises(Overloaded):
            plain.submit(request(prompt), lambda event: None)


def test_numbers_at_the_ends_of_the_schema_are_no_errors(engine: Engine) -> None:
    """Whatever the HTTP schema lets through: greatest and least seeds, lengths and counts."""
    end = engine.tokenizer.eog_ids  # type: ignore[attr-defined]
    stop = dict.fromkeys(end, 100.0)
    for how in (
        {"seed": 2**63 - 1, "temperature": 100.0},
        {"seed": 0, "top_k": 2**31},
        {"logit_bias": dict.fromkeys(range(300), -100.0), "temperature": 100.0},
        {"top_p": 0.0, "min_p": 1.0, "typical_p": 0.0, "temperature": 1.0},
        {"repeat_penalty": 1e-300, "presence_penalty": -2.0, "frequency_penalty": -2.0, "temperature": 1.0},
    ):
        answer = ask(engine, request(PROMPT, 5, **how))
        assert answer.end.completion_tokens == 5
        assert set(answer.tokens).isdisjoint(how.get("logit_bias", {}))
    until_the_end = request(PROMPT, 2**31, logit_bias=stop, ignore_eos=False, temperature=100.0)
    assert (ask(engine, until_the_end).end.reason, ask(engine, until_the_end).text) == ("stop", "")
    late = memory(None, warmup_tokens=2**31)
    assert ask(engine, request(PROMPT, 5, memory=late)).tokens == ask(engine, request(PROMPT, 5)).tokens
