"""The whole engine: what must be equal, llama.cpp's text, and how fast it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine import speed as engine_speed
from atlas_jax.engine.api import Delta, GenerationRequest, MemoryParams, Prompt, SamplingParams, SessionKey, TokenInfo
from atlas_jax.engine.offline import ask
from benchmarks import quality
from benchmarks.accelerator import machine_part
from tests import tiny_model

_SIZES = tiny_model.Shape(layers=30, embed=576, heads=9, kv_heads=3, head_dim=64, ff=1536, nibbles=True)
"""SmolLM2-135M's, but for the vocabulary."""
_GOLDEN = Path("tests/golden/peer")
_BITS = 0.0
_ROUNDING = 0.05
"""A log-probability's difference that another order of float sums can make, where a compiler does not keep rows apart."""
_CHUNKED = 0.3
"""The same where a text is cut into other chunks: in 8 bits the last bit of a sum moves a value by a whole step."""


@contextmanager
def opened(task: Any, **settings: Any) -> Iterator[Engine]:
    """An engine that compiles what is asked of it and nothing else."""
    model, adapter = task.model, None
    if model is None:
        model, adapter = task.work / "random.gguf", task.work / "random.safetensors"
        if not adapter.exists():
            tiny_model.write_model(model, tiny_model.LLAMA if task.quick else _SIZES)
            tiny_model.write_adapter(adapter, model)
    defaults: dict[str, Any] = {"max_concurrent": 4, "max_context": 2048, "max_window": 512}
    engine = Engine.open(
        model_path=model, adapter_path=adapter, cache_path=task.work / "cache", **{**defaults, **settings}
    )
    engine._serving.warm_up.stop(60)
    try:
        yield engine
    finally:
        engine.close(timeout=20)


def _request(tokens: Sequence[int], count: int, memory: MemoryParams | None = None, **more: Any) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, logprobs=0)
    return GenerationRequest(
        prompt=list(tokens), max_tokens=count, sampling=sampling, ignore_eos=True, reuse=False, memory=memory, **more
    )


def _answers(engine: Engine, requests: Sequence[GenerationRequest]) -> list[list[TokenInfo]]:
    return [
        [info for event in events if isinstance(event, Delta) for info in event.tokens]
        for events in ask(engine, requests)
    ]


def _apart(one: list[TokenInfo], other: list[TokenInfo]) -> float:
    """The largest difference of a log-probability, up to where the tokens differ."""
    largest = 0.0
    for left, right in zip(one, other, strict=True):
        largest = max(largest, abs(left.logprob - right.logprob))
        if left.token != right.token:
            break
    return largest


def invariants(task: Any) -> None:
    """See `benchmarks.accelerator`."""
    same = _BITS if jax.default_backend() == "cpu" else _ROUNDING

    def compare(what: str, one: list[list[TokenInfo]], other: list[list[TokenInfo]], most: float) -> None:
        pairs = list(zip(one, other, strict=True))
        equal = all(left == right for left, right in pairs)
        off = max(_apart(left, right) for left, right in pairs)
        task.found(what, "equal bits" if equal else f"off by {off:.1e}, at most {most:.0e}", ok=equal or off <= most)

    count, window = (6, 2 * PAGE) if task.quick else (32, 4 * PAGE)
    with opened(task) as engine:
        texts = [text[: 30 + 40 * i] for i, text in enumerate(engine_speed.prose(engine, 4, 200, 0))]
        alone = [_answers(engine, [_request(text, count)])[0] for text in texts]
        compare(
            "four texts alone and together", _answers(engine, [_request(text, count) for text in texts]), alone, same
        )
        memory = MemoryParams(window_size=window)
        inside = [_answers(engine, [_request(text, count, memory)])[0] for text in texts]
        compare("the memory inside its window, and none", inside, alone, same)
        scored = []
        for text, answer in zip(texts, alone, strict=True):
            whole = [*text, *(info.token for info in answer)]
            (events,) = ask(engine, [_request(whole, 0, prompt_logprobs=0)])
            read = next(event for event in events if isinstance(event, Prompt)).tokens
            scored.append([np.float64(info.logprob or 0.0) for info in read[len(text) :]])
        off = max(
            abs(float(info.logprob - logprob))
            for answer, row in zip(alone, scored, strict=True)
            for info, logprob in zip(answer, row, strict=True)
        )
        what = "token by token and read at once"
        task.found(what, f"off by {off:.1e}, at most {_CHUNKED:.0e}", ok=off <= _CHUNKED)
    with opened(task, speculate=False) as engine:
        undrafted = [_answers(engine, [_request(text, count)])[0] for text in texts]
        compare("with drafts and without", undrafted, alone, same)
    _sessions(task, compare, same)


def _sessions(task: Any, compare: Any, most: float) -> None:
    """A conversation longer than its window goes on in another process's engine as in this one."""

    def turn(engine: Engine, number: int) -> list[list[TokenInfo]]:
        (text,) = engine_speed.prose(engine, 1, 2 * PAGE + 20, number)
        key = SessionKey("check", "session")
        return _answers(engine, [_request(text, 4, MemoryParams(session=key, window_size=PAGE))])

    folders = [task.work / name for name in ("sessions-one", "sessions-two")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    with opened(task, memory_path=folders[0]) as engine:
        turn(engine, 1)
        going_on = turn(engine, 2)
    with opened(task, memory_path=folders[1]) as engine:
        turn(engine, 1)
    with opened(task, memory_path=folders[1]) as engine:
        compare("a session saved and loaded, and not", turn(engine, 2), going_on, most)


def golden(task: Any) -> None:
    """See `benchmarks.accelerator`."""
    name = None if task.model is None else task.model.name.lower().removesuffix(".gguf").replace(".", "-")
    file = None if name is None else _GOLDEN / f"{name}.continuations.json"
    if file is None or not file.exists():
        task.found("greedy text of llama.cpp", "left out: it is of a model that is not here")
        return
    with opened(task, memory_enabled=False) as engine:
        found = quality.continuations(engine, json.loads(file.read_text()))
    share = max(value for key, value in found.items() if key.startswith("agree"))
    task.found("greedy text of llama.cpp", f"{share:.0%} of {found['prompts']} prompts agree", ok=share >= 0.8, **found)


def speed(task: Any) -> None:
    """See `benchmarks.accelerator`."""
    streams, tokens, steps = ((1, 2), 300, 8) if task.quick else ((1, 16, 128), 2048, 64)
    rounds = 1 if task.quick else 2
    known = machine_part.peak(jax.devices()[0].device_kind)
    bandwidth = machine_part.copy_bandwidth(task.quick) if known is None else 1e9 * known[0]
    of = "what a copy reaches" if known is None else "its peak"
    with opened(task, max_concurrent=max(streams), max_context=4096, max_waiting=256) as engine:
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._serving.runner._weights.params))  # type: ignore[attr-defined]
        before: dict[str, float] = {}
        for test in engine_speed.tests(streams, tokens=tokens, steps=steps, memory=True):
            (found,) = engine_speed.measure(engine, (test,), rounds, lambda _: None)
            said = f"{found.median:.0f} tokens/s"
            more: dict[str, Any] = {"tokens_per_second": found.values, "streams": test.streams, "memory": test.memory}
            if test.steps > 1:
                share = weights * found.median / test.streams / bandwidth
                said += f"; the weights alone, {weights / 1e6:.0f} MB a step, are {share:.0%} of {of}"
                more["share"] = share
            if test.memory:
                said += f"; the memory takes {1 - found.median / before[test.name]:.0%}"
            before[test.name] = found.median
            task.found(f"{test.name}{' with the memory' if test.memory else ''}", said, **more)
        stats = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            task.found("memory at most", f"{stats['peak_bytes_in_use'] / 2**30:.2f} GiB")
