"""LoRA adapters beside a served model: scales of requests, of sessions and of what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.config import PAGE, ConfigError
from atlas_jax.engine import Engine
from atlas_jax.engine.api import GenerationRequest, InvalidRequest, SnapshotInvalid
from atlas_jax.engine.sessions.lora import check_loaded, lora_scales, read_lora, scales_of
from atlas_jax.kernels.cpu import library
from atlas_jax.model.lm.export import ARCHITECTURE as TRAINED
from atlas_jax.model.lora_file import LoraError
from tests import tiny_lora
from tests.engine.offline import Answer, ask, ask_all, memory, request, words
from tests.engine.test_invariants import assert_same

engines_of_their_own = pytest.mark.slow  # 10 s of processor time each to open
BOTH = [(0.0, 0.0), (1.0, 0.0), (0.0, -0.5), (0.25, 2.0)]
HOW: dict[str, Any] = {"max_concurrent": 4, "max_context": 512}


@pytest.fixture(scope="module")
def adapters(models: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files for a tiny model; the second changes few of its weights."""
    folder, (model, _) = tmp_path_factory.mktemp("lora"), models["native"]
    most = tiny_lora.pairs_of(model, chosen=r"(blk|token_embd)\.", seed=1)
    some = tiny_lora.pairs_of(model, chosen=r"blk\.1\.(attn_q|ffn_down)\.", rank=2, seed=2)
    head = tiny_lora.pairs_of(model, chosen=r"output\.", seed=3)
    assert head
    files = {"first": most, "second": some, "head": head}
    return [str(tiny_lora.write_lora(folder / f"{name}.gguf", model, pairs)) for name, pairs in files.items()]


@pytest.fixture(scope="module")
def adapted(opened: Callable[..., Any], adapters: list[str]) -> Iterator[Engine]:
    """The engine with both; a request that says nothing uses the first at 0.5."""
    with opened("native", lora=(f"{adapters[0]}=0.5", f"{adapters[1]}=0"), **HOW) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(opened: Callable[..., Any]) -> Iterator[Engine]:
    with opened("native", **HOW) as engine:
        yield engine


def scaled(prompt: list[int], lora: tuple[float, ...] | None, tokens: int = 8, **more: Any) -> GenerationRequest:
    return request(prompt, tokens, lora=lora, **more)


def likely(answer: Answer) -> list[float | None]:
    return [info.logprob for info in answer.infos]


@engines_of_their_own
@pytest.mark.skipif(not library.available(), reason="no native kernels: XLA fuses what it multiplies itself otherwise")
def test_at_scale_0_no_bit_is_another(plain: Engine, adapted: Engine) -> None:
    """With a memory and without, whatever its neighbours use."""
    for how in ({}, {"memory": memory()}):
        prompt = words(1, 2 * PAGE + 5)
        wanted = ask(plain, request(prompt, 8, **how))
        assert_same(ask(adapted, scaled(prompt, (0.0, -0.0), **how)), wanted)
        beside = ask_all(adapted, [scaled(words(2, 20), (1.0, 1.0)), scaled(prompt, (0.0, 0.0), **how)])
        assert_same(beside[1], wanted)


@engines_of_their_own
def test_at_scale_0_of_the_head_no_more_than_the_last_bit_is_another(
    opened: Callable[..., Any], plain: Engine, adapters: list[str]
) -> None:
    with opened("native", lora=(adapters[2],), **HOW) as engine:
        for how in ({}, {"memory": memory()}):
            prompt = words(1, 2 * PAGE + 5)
            wanted, found = ask(plain, request(prompt, 8, **how)), ask(engine, scaled(prompt, (0.0,), **how))
            assert found.tokens == wanted.tokens
            np.testing.assert_allclose(likely(found), likely(wanted), rtol=3e-7)  # type: ignore[arg-type]
            assert likely(ask(engine, scaled(prompt, (1.0,), **how))) != likely(wanted)


@engines_of_their_own
def test_rows_of_a_batch_are_what_each_is_alone(adapted: Engine) -> None:
    prompt = words(3, 40)
    asked = [scaled(prompt, scales, temperature=0.8, seed=5) for scales in BOTH]
    alone = [ask(adapted, one) for one in asked]
    for one, other in zip(ask_all(adapted, asked), alone, strict=True):
        assert_same(one, other)
    assert len({tuple(likely(one)) for one in alone}) == len(BOTH)


@engines_of_their_own
def test_other_scales_compile_nothing(adapted: Engine, compiled: list[str]) -> None:
    def run(scales: list[tuple[float, float]]) -> None:
        ask_all(adapted, [scaled(words(4, 150), one, memory=memory()) for one in scales[:2]])
        ask(adapted, scaled(words(5, 30), scales[2], prompt_logprobs=0))

    run([(0.0, 0.0)] * 3)
    before = len(compiled)
    run([(0.3, 0.1), (-1.0, 0.0), (0.7, 0.7)])
    adapted.scale_lora((0.125, 3.0))
    ask(adapted, scaled(words(5, 30), None))
    adapted.scale_lora((0.5, 0.0))
    assert compiled[before:] == []


@engines_of_their_own
def test_who_says_nothing_gets_the_scales_of_the_engine(adapted: Engine) -> None:
    prompt = words(6, 30)
    assert [(one.name, one.scale) for one in adapted.lora] == [("first.gguf", 0.5), ("second.gguf", 0.0)]
    assert_same(ask(adapted, scaled(prompt, None)), ask(adapted, scaled(prompt, (0.5, 0.0))))
    adapted.scale_lora((0.0, 2.0))
    try:
        assert_same(ask(adapted, scaled(prompt, None)), ask(adapted, scaled(prompt, (0.0, 2.0))))
    finally:
        adapted.scale_lora((0.5, 0.0))


@engines_of_their_own
@pytest.mark.parametrize("scales", [(), (1.0,), (1.0, 1.0, 1.0), (float("nan"), 0.0), (1e9, 0.0)])
def test_scales_that_cannot_be_are_refused(adapted: Engine, scales: tuple[float, ...]) -> None:
    for act in (lambda: adapted.submit(scaled([1], scales), print), lambda: adapted.scale_lora(scales)):
        with pytest.raises(InvalidRequest) as caught:
            act()
        assert caught.value.param == "lora"
    assert [one.scale for one in adapted.lora] == [0.5, 0.0]


@engines_of_their_own
def test_a_prefix_is_shared_under_the_same_scales_alone(adapted: Engine) -> None:
    prompt = words(7, 2 * PAGE + 9)
    fresh = ask(adapted, scaled(prompt, (1.0, 0.0), reuse=False))
    assert ask(adapted, scaled(prompt, (0.0, 1.0))).end.cached_tokens == 0
    first, again, other = (ask(adapted, scaled(prompt, scales)) for scales in ((1.0, 0.0), (1.0, 0.0), (0.5, 0.0)))
    assert [one.end.cached_tokens for one in (first, again, other)] == [0, 2 * PAGE, 0]
    assert_same(first, fresh)
    assert_same(again, fresh)


@engines_of_their_own
def test_a_session_keeps_the_scales_it_began_with(adapted: Engine) -> None:
    said, more = words(8, PAGE + 30), words(9, 12)

    def begun(name: str, scales: tuple[float, ...] | None) -> None:
        ask(adapted, scaled(said, scales, memory=memory(name)))

    begun("one", (1.0, 0.0))
    begun("same", (1.0, 0.0))
    begun("plain", (0.0, 0.0))
    with pytest.raises(InvalidRequest, match="keeps them") as caught:
        ask(adapted, scaled(more, (0.5, 0.0), memory=memory("one")))
    assert caught.value.param == "lora"
    silent = ask(adapted, scaled(more, None, memory=memory("one")))
    assert_same(silent, ask(adapted, scaled(more, (1.0, 0.0), memory=memory("same"))))
    plain = ask(adapted, scaled(more, None, memory=memory("plain")))
    assert likely(plain) != likely(silent)


@engines_of_their_own
def test_what_is_stored_goes_on_under_the_same_adapters_alone(
    opened: Callable[..., Any], adapters: list[str], tmp_path: Path
) -> None:
    """In whatever order they are given; a session that used none goes on anywhere."""
    said, more, scales = words(10, PAGE + 20), words(11, 10), (0.75, -1.0)
    how = {**HOW, "memory_path": tmp_path / "sessions"}
    with opened("native", lora=tuple(adapters[:2]), **how) as engine:
        for name in ("saved", "told"):
            ask(engine, scaled(said, scales, memory=memory(name)))
        ask(engine, scaled(said, (0.0, 0.0), memory=memory("plain")))
        wanted = [ask(engine, scaled(more, None, memory=memory(name))) for name in ("told", "plain")]
        engine.sessions.save_session("owner", "saved")
    with opened("native", lora=(adapters[1],), **how) as engine:
        aside = {one.name: one.reason for one in engine.sessions.set_aside("owner")}
        assert set(aside) == {"saved", "told"}
        assert all("snapshot was made with LoRA adapter" in reason for reason in aside.values())
        ask(engine, scaled(words(12, 5), None, memory=memory("plain")))
    with opened("native", lora=(adapters[1], adapters[0]), **how) as engine:
        assert engine.sessions.set_aside("owner") == ()
        found = ask(engine, scaled(more, tuple(reversed(scales)), memory=memory("saved")))
        assert_same(found, wanted[0])


@given(st.dictionaries(st.text("0123456789abcdef", min_size=1), st.floats(-1000, 1000), max_size=4))
def test_scales_are_read_back_as_they_were_stored_whatever_the_order(scales: dict[str, float]) -> None:
    stored = lora_scales(list(scales), list(scales.values()))
    assert read_lora(msgspec.json.decode(msgspec.json.encode({"lora": stored}))) == stored
    backwards = list(reversed(scales))
    assert lora_scales(backwards, [scales[digest] for digest in backwards]) == stored
    np.testing.assert_array_equal(scales_of(stored, backwards), [[np.float32(scales[digest]) for digest in backwards]])
    check_loaded(dict(stored), backwards)


@pytest.mark.parametrize(
    "stored",
    ["a", [["a"]], [[1, 1.0]], [["a", 0.0]], [["b", 1.0], ["a", 1.0]], [["a", 1.0], ["a", 2.0]], [["a", float("inf")]]],
)
def test_stored_scales_that_nobody_wrote_are_refused(stored: Any) -> None:
    with pytest.raises(SnapshotInvalid, match="LoRA adapters"):
        read_lora({"lora": stored})


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        (("=0.5",), ConfigError, "no file is named"),
        (("adapter.gguf=1e9",), ConfigError, "scale must be between"),
        (("adapter.gguf=nan",), ConfigError, "scale must be between"),
        (("missing.gguf=0.5",), FileNotFoundError, "missing.gguf"),
    ],
)
def test_settings_that_name_no_adapter_are_refused(
    opened: Callable[..., Any], lora: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), opened("native", lora=lora):
        pass


def test_an_adapter_is_given_once(opened: Callable[..., Any], adapters: list[str]) -> None:
    with pytest.raises(LoraError, match=r"first\.gguf: it is the same as"), opened("native", lora=(adapters[0],) * 2):
        pass


def test_a_model_with_a_memory_of_its_own_takes_none(tmp_path: Path, adapters: list[str]) -> None:
    path = tmp_path / "trained.gguf"
    writer = GGUFWriter(path, TRAINED)
    writer.add_tensor("embed", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="lora cannot be set"):
        Engine.open(model_path=path, lora=tuple(adapters), cache_path=tmp_path)
