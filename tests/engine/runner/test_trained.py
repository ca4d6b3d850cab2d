"""Trained models with a memory of their own behind the engine: what they say, their sessions, and files that lie."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import (
    Delta,
    Embedded,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    InvalidRequest,
    Pooling,
    SessionKey,
    SnapshotInvalid,
    StateBytes,
)
from atlas_jax.engine.sessions import snapshot
from atlas_jax.engine.sessions.codec import decode_session, encode_session
from atlas_jax.gguf import BYTE_VOCAB, GGUFError, byte_vocabulary, write_gguf
from atlas_jax.memory import presets
from atlas_jax.model.lm import LMConfig, export_gguf
from atlas_jax.model.lm.export import CONFIG_KEY
from atlas_jax.model.lm.model import create, split
from tests.engine.offline import Answer, ask, ask_all, memory, request, words
from tests.patience import PATIENCE

BASE = LMConfig(
    vocab=BYTE_VOCAB,
    embed=16,
    ff=24,
    heads=2,
    kv_heads=1,
    pattern="MG",
    window=24,
    segment=8,
    persistent=1,
    context_length=256,
    rule=presets.titans(8, 8, chunk=8, hidden=8),
    memory_heads=2,
    dot_hidden=8,
)
CONFIGS = {"bounded": BASE, "unbounded": BASE.replace(pattern="LAC")}
NAMES = pytest.mark.parametrize("name", ["bounded", pytest.param("unbounded", marks=pytest.mark.slow)])
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SHORT, LONG, NEXT = words(21, 11, 256), words(22, PAGE + 30, 256), words(23, 9, 256)


def draw(config: LMConfig) -> Any:
    """Parameters of which none is left as it starts: gates that depend on the token, taps that mix."""
    leaves, tree = jax.tree.flatten(split(create(config, 0))[1])
    random = np.random.default_rng(5)
    return tree.unflatten(
        [jnp.asarray(x + 0.3 * random.standard_normal(x.shape) * (np.std(x) + 0.1), jnp.float32) for x in leaves]
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    for name, config in CONFIGS.items():
        export_gguf(folder / f"{name}.gguf", config, draw(config), byte_vocabulary())
    return {name: folder / f"{name}.gguf" for name in CONFIGS}


@pytest.fixture(scope="module")
def opened(files: dict[str, Path], cache: Path) -> Callable[..., Any]:
    @contextmanager
    def open_engine(name: str, **settings: Any) -> Iterator[Engine]:
        engine = Engine.open(model_path=files[name], cache_path=cache, **{"max_concurrent": 2, **settings})
        try:
            yield engine
        finally:
            engine.close(timeout=PATIENCE)

    return open_engine


@pytest.fixture(scope="module")
def engines(opened: Callable[..., Any]) -> Iterator[Callable[[str], Engine]]:
    found: dict[str, Engine] = {}
    with ExitStack() as stack:

        def get(name: str) -> Engine:
            if name not in found:
                found[name] = stack.enter_context(opened(name))
            return found[name]

        yield get


@pytest.fixture(scope="module")
def greedy() -> Callable[[str, list[int], int], list[int]]:
    """What the training form would write after a text."""
    forms = {
        name: (jax.jit(split(create(config, 0))[0], compiler_options=QUICK), draw(config))
        for name, config in CONFIGS.items()
    }

    def answer(name: str, text: list[int], count: int) -> list[int]:
        apply, params = forms[name]
        text, size = list(text), -(-(len(text) + count) // 64) * 64
        for _ in range(count):
            padded = jnp.asarray([text + [0] * (size - len(text))])  # causal: what follows changes nothing
            text.append(int(apply(params, padded)[0, len(text) - 1].argmax()))
        return text[-count:]

    return answer


# --- what they say ----------------------------------------------------------------------------------------------------
@NAMES
@pytest.mark.parametrize(
    "prompt", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)
def test_an_answer_is_the_models_own(
    engines: Callable[[str], Engine], greedy: Callable[..., list[int]], name: str, prompt: list[int]
) -> None:
    answer = ask(engines(name), request(prompt, 12))
    assert answer.tokens == greedy(name, prompt, 12)
    assert answer.end.reason == "length"
    assert (answer.end.prompt_tokens, answer.end.completion_tokens) == (len(prompt), 12)


@pytest.mark.slow
def test_the_prompt_is_scored_as_in_training(engines: Callable[[str], Engine]) -> None:
    config = CONFIGS["bounded"]
    apply = jax.jit(split(create(config, 0))[0], compiler_options=QUICK)
    logits = np.asarray(apply(draw(config), jnp.asarray([LONG]))[0], np.float64)
    scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    wanted = scores[np.arange(len(LONG) - 1), LONG[1:]]
    answer = ask(engines("bounded"), request(LONG, 0, prompt_logprobs=2))
    found = [info.logprob for info in answer.prompt.tokens[1:]]
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert all(len(info.top) == 2 for info in answer.prompt.tokens[1:])


def test_embeddings_are_what_the_training_form_makes_of_the_text(engines: Callable[[str], Engine]) -> None:
    config = CONFIGS["bounded"]
    params = draw(config)
    head = params["embed" if config.tied_head else "head"]
    apply = jax.jit(split(create(config, 0))[0], compiler_options=QUICK)
    logits = np.asarray(apply(params, jnp.asarray([LONG]))[0], np.float64)
    states = np.linalg.lstsq(np.asarray(head, np.float64), logits.T, rcond=None)[0].T  # what the head has read
    poolings: tuple[Pooling, Pooling] = ("mean", "last")
    asked = [GenerationRequest(prompt=LONG, max_tokens=0, pooling=pooling) for pooling in poolings]
    answers = ask_all(engines("bounded"), asked)
    for answer, wanted in zip(answers, (states.mean(axis=0), states[-1]), strict=True):
        (found,) = [event.vector for event in answer.events if isinstance(event, Embedded)]
        np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted), atol=1e-3)


@NAMES
def test_neighbours_change_nothing(engines: Callable[[str], Engine], name: str) -> None:
    """Requests of different lengths, some of which end and make room while others go on."""
    asked = [request(words(40 + i, 5 + 23 * i, 256), 6 + 5 * i) for i in range(5)]
    asked[2] = request(words(42, 51, 256), 30, temperature=0.9, seed=3)
    together = ask_all(engines(name), asked)
    for one, alone in zip(together, [ask(engines(name), each) for each in asked], strict=True):
        assert one.tokens == alone.tokens
        np.testing.assert_allclose(
            [info.logprob for info in one.infos], [info.logprob for info in alone.infos], atol=1e-3
        )


def test_nothing_compiles_once_it_is_warm(engines: Callable[[str], Engine], compiled: list[str]) -> None:
    engine = engines("bounded")
    assert engine.warm_up(240)
    before = len(compiled)
    ask_all(engine, [request(words(60 + i, 20 * i + 1, 256), 9) for i in range(6)])
    ask(engine, request(LONG, 4, memory=memory("warm")))
    ask(engine, request(NEXT, 4, memory=memory("warm")))
    ask(engine, request(LONG, 2, prompt_logprobs=1))
    assert compiled[before:] == []


# --- sessions ---------------------------------------------------------------------------------------------------------
@NAMES
def test_a_session_is_one_text(engines: Callable[[str], Engine], greedy: Callable[..., list[int]], name: str) -> None:
    engine = engines(name)
    text = list(LONG)
    first = ask(engine, request(LONG, 7, memory=memory("one text")))
    text += first.tokens + NEXT
    second = ask(engine, request(NEXT, 7, memory=memory("one text")))
    assert second.tokens == greedy(name, text, 7)
    assert second.end.memory is not None
    assert second.end.memory.cache_hit
    # the answer's last token was not read before, and this one's has not been read now
    assert second.end.memory.tokens_absorbed == 1 + len(NEXT) - 1 + 7
    again = ask(engine, request(SHORT, 3, memory=memory("one text")))
    assert again.tokens == greedy(name, text + second.tokens + SHORT, 3)


def test_a_bounded_session_outgrows_the_trained_context(
    engines: Callable[[str], Engine], greedy: Callable[..., list[int]]
) -> None:
    engine = engines("bounded")
    text: list[int] = []
    before = engine.model.state.total
    for turn in range(3):
        new = words(70 + turn, 150, 256)
        answer = ask(engine, request(new, 5, memory=memory("grows")))
        text += new
        assert answer.tokens == greedy("bounded", text, 5)
        text += answer.tokens
    assert len(text) > engine.model.context_length
    (row,), _ = engine.sessions.list("owner", after="grov", limit=1)
    info, done = engine.sessions.info("owner", "grows"), answer.end.memory
    assert done is not None
    for found in (row, info, done, engine.stats()):  # all of its state is the model's own memory
        assert (found.kept_pairs, found.kept_pairs_capacity) == (0, 0)
        assert found.state == StateBytes(memory=before)
    assert (row.session_id, row.tokens) == ("grows", len(text) - 1)
    assert row.bytes == 3 * before  # its last turns' states, each of one size


@pytest.mark.parametrize("ending", ["stop string", "end of generation"])
def test_an_answer_that_ends_early_leaves_what_was_read(
    engines: Callable[[str], Engine], greedy: Callable[..., list[int]], ending: str
) -> None:
    engine = engines("bounded")
    if ending == "stop string":
        plain = ask(engine, request(SHORT, 30)).tokens
        stop = next(token for token in plain if token < 128)  # a character by itself
        first = ask(engine, request(SHORT, 30, memory=memory(ending), stop=[engine.tokenizer.decode([stop])]))
        read = plain[: plain.index(stop) + 1]
    else:
        end = engine.tokenizer.encode("<|endoftext|>", add_special=False, parse_special=True)[0]
        first = ask(engine, request(SHORT, 12, memory=memory(ending), ignore_eos=False, logit_bias={end: 100.0}))
        read = [end]
    assert first.end.reason == "stop"
    second = ask(engine, request(NEXT, 6, memory=memory(ending)))
    assert second.tokens == greedy("bounded", SHORT + read + NEXT, 6)


def test_a_cancelled_answer_leaves_a_session_that_knows_what_it_has_read(
    engines: Callable[[str], Engine], greedy: Callable[..., list[int]]
) -> None:
    engine = engines("bounded")
    ended, ready = threading.Event(), threading.Lock()
    tokens: list[int] = []
    handles: list[Any] = []

    def listen(event: Event) -> None:
        if isinstance(event, Delta):
            tokens.extend(info.token for info in event.tokens)
            if len(tokens) >= 4:
                with ready:  # the handle is there
                    handles[0].cancel()
        if isinstance(event, Finished | Failed):
            ended.set()

    with ready:
        handles.append(engine.submit(request(SHORT, 200, memory=memory("cancelled")), listen))
    assert ended.wait(60)
    (row,), _ = engine.sessions.list("owner", after="cancelle", limit=1)
    generated = row.tokens + 1 - len(SHORT)  # all but the last have been read
    assert 4 <= generated < 200
    written = greedy("bounded", SHORT, generated)
    assert written[: len(tokens)] == tokens[:generated]
    second = ask(engine, request(NEXT, 6, memory=memory("cancelled")))
    assert second.tokens == greedy("bounded", SHORT + written + NEXT, 6)


def test_an_edited_turn_goes_back_to_where_the_texts_part(
    engines: Callable[[str], Engine], greedy: Callable[..., list[int]]
) -> None:
    engine = engines("bounded")
    first = ask(engine, request(SHORT, 5, memory=memory("edited")))
    told = SHORT + first.tokens
    ask(engine, request(told + NEXT, 5, memory=memory("edited")))
    edited = told + words(80, 12, 256)
    answer = ask(engine, request(edited, 8, memory=memory("edited")))
    assert answer.tokens == greedy("bounded", edited, 8)
    assert answer.end.cached_tokens == len(told) - 1


def test_choices_and_reading_without_learning_leave_no_trace(engines: Callable[[str], Engine]) -> None:
    engine = engines("bounded")
    ask(engine, request(SHORT, 4, memory=memory("still")))
    wanted = ask(engine, request(NEXT, 6, memory=memory("still", write=False)))
    ask(engine, request(LONG, 6, memory=memory("still"), choice=1))
    assert ask(engine, request(NEXT, 6, memory=memory("still"))).infos == wanted.infos


@NAMES
def test_a_session_goes_on_after_a_restart_as_if_there_had_been_none(
    opened: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    def turn(engine: Engine, prompt: list[int]) -> Answer:
        return ask(engine, request(prompt, 6, memory=memory("s")))

    with opened(name, memory_path=tmp_path) as before:
        turn(before, LONG)
        before.sessions.save_session("owner", "s")
        info = before.sessions.info("owner", "s")
        wanted = turn(before, NEXT)
    with opened(name, memory_path=tmp_path) as after:
        after.sessions.load_context("owner", "s")
        assert after.sessions.info("owner", "s") == info
        found = turn(after, NEXT)
    assert found.infos == wanted.infos
    assert info.layers[0].norm > 0
    assert info.memory_used == min(info.memory_capacity, len(LONG) + 5)


# --- limits -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given",
    [{"window_size": 256}, {"use_muon": True}, {"polynomial_degree": 3}, {"memory_budget": 1 << 24}, {"kept_pairs": 0}],
)
def test_settings_of_the_recall_memory_are_refused_by_name(
    engines: Callable[[str], Engine], given: dict[str, Any]
) -> None:
    (name,) = given
    with pytest.raises(InvalidRequest, match=rf"atlas\.{name}") as error:
        ask(engines("bounded"), request(SHORT, 2, memory=memory("s", given=frozenset(given), **given)))
    assert error.value.param == f"atlas.{name}"
    with pytest.raises(InvalidRequest, match=r"atlas\.read"):
        ask(engines("bounded"), request(SHORT, 2, memory=memory(read=False)))


@pytest.mark.slow
def test_attention_to_everything_ends_with_the_context(engines: Callable[[str], Engine]) -> None:
    engine, context = engines("unbounded"), CONFIGS["unbounded"].context_length
    answer = ask(engine, request(words(90, context - 4, 256), 50, memory=memory("full")))
    assert len(answer.tokens) == 4
    with pytest.raises(InvalidRequest, match="context") as error:
        ask(engine, request(NEXT, 1, memory=memory("full")))
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequest, match="context"):
        ask(engine, request(words(91, context + 1, 256), 1))


# --- files that lie ---------------------------------------------------------------------------------------------------
def lying(folder: Path, **changes: Any) -> Path:
    """A model whose configuration says something else than its tensors."""
    config = CONFIGS["bounded"]
    path = folder / "lying.gguf"
    said = json.dumps(json.loads(config.to_json()) | changes)
    flat = jax.tree_util.tree_leaves_with_path(draw(config))
    tensors = {".".join(str(key.key) for key in at).replace("blocks.", "blk."): np.asarray(x) for at, x in flat}
    tensors["token_embd.weight"], tensors["output_norm.weight"] = tensors.pop("embed"), tensors.pop("final_norm.scale")
    write_gguf(path, {"general.architecture": "atlas", CONFIG_KEY: said} | dict(byte_vocabulary()), tensors)
    return path


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"window": 1 << 40}, "state of one sequence"),
        ({"pattern": "M" * 100_000}, "more layers"),
        ({"pattern": "MM"}, "tensor"),
        ({"vocab": 300}, "tensor"),
        ({"embed": 1 << 40}, "tensor"),
        ({"embed": "16"}, "config"),
        ({"heads": -1}, "config"),
        ({"rule": {"d_k": 8}}, "config"),
        ({"gate_start": None}, "config"),
        ({"surprise": 1}, "config"),
    ],
)
def test_a_configuration_that_lies_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(GGUFError, match=word):
        Engine.open(model_path=lying(tmp_path, **changes), cache_path=tmp_path)


def test_a_damaged_state_is_refused(engines: Callable[[str], Engine]) -> None:
    engine = engines("bounded")
    ask(engine, request(SHORT, 4, memory=memory("damaged")))
    layout = engine._serving.table._layout  # type: ignore[union-attr]
    lease = engine.sessions.tiers.acquire(SessionKey("owner", "damaged"), time.monotonic())
    assert lease is not None
    session = lease.session
    assert session is not None
    engine.sessions.tiers.release(lease, None, "lru")
    head, header, arrays = snapshot.decode(encode_session(layout, session))

    def encoded(arrays: dict[str, np.ndarray]) -> bytes:
        return snapshot.encode(head.listing, head.bound, header, arrays)

    again = decode_session(layout, encoded(arrays))
    jax.tree.map(np.testing.assert_array_equal, again.checkpoints[-1].row, session.checkpoints[-1].row)
    for name, array in arrays.items():
        if not name.startswith("state"):
            continue
        worse: list[np.ndarray] = [array[..., :0], array.astype(np.float64)]
        if array.dtype.kind == "f" and array.size:
            worse.append(np.where(np.arange(array.size).reshape(array.shape) == 0, np.nan, array))
        if array.dtype.kind == "i":
            worse += [array + 1000, array - 1000]
        for bad in worse:
            if bad.size == array.size and bad.dtype == array.dtype and not bad.size:
                continue
            with pytest.raises(SnapshotInvalid, match="state"):
                decode_session(layout, encoded(arrays | {name: bad.astype(bad.dtype)}))
        with pytest.raises(SnapshotInvalid, match="state"):
            decode_session(layout, encoded({k: v for k, v in arrays.items() if k != name}))


@pytest.mark.slow
def test_rows_past_the_last_token_stand_for_nothing(tmp_path: Path, cache: Path) -> None:
    config = BASE.replace(pattern="M", vocab=BYTE_VOCAB + 7, tied_head=False)
    params = draw(config)
    params["head"] = params["head"].at[BYTE_VOCAB:].set(9.0)  # they would be drawn at once
    export_gguf(tmp_path / "padded.gguf", config, params, byte_vocabulary())
    engine = Engine.open(model_path=tmp_path / "padded.gguf", cache_path=cache, max_concurrent=1)
    try:
        answer = ask(engine, request(SHORT, 30, temperature=100.0))
        assert engine.model.vocab_size == BYTE_VOCAB
        assert max(answer.tokens) < BYTE_VOCAB
    finally:
        engine.close(timeout=PATIENCE)
