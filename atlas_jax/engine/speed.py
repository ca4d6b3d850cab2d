"""How fast an engine is: prefill, and greedy decoding of several streams, with the memory and without."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished, GenerationRequest, MemoryParams, SamplingParams
from atlas_jax.engine.offline import ask
from atlas_jax.recall.adapter_store import probe_filler

_CONTEXT = 640
"""Tokens of each stream's prompt where decoding is measured: more than the default window, so that the memory is read."""


@dataclass(frozen=True)
class Test:
    """What is measured.

    Attributes:
      tokens: of each stream's prompt.
      steps: tokens each stream writes; 1 where prefill is measured.
    """

    name: str
    streams: int
    tokens: int
    steps: int
    memory: bool


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one test, over its rounds."""

    test: Test
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)


def tests(streams: Sequence[int], *, tokens: int, steps: int, memory: bool) -> tuple[Test, ...]:
    """Prefill of `tokens` tokens, and `steps` tokens of each number of streams; each with the memory too, if there is one."""
    kinds = (False, True) if memory else (False,)
    prefill = [Test(f"prefill {tokens}", 1, tokens, 1, kind) for kind in kinds]
    decode = [Test(f"decode {count}", count, _CONTEXT, steps, kind) for count in streams for kind in kinds]
    return (*prefill, *decode)


def measure(engine: Engine, what: Sequence[Test], rounds: int, progress: Callable[[str], None]) -> list[Speed]:
    """Runs the tests in turns, so that whatever else the machine does falls on all; one round more warms up."""
    found: dict[Test, list[float]] = {test: [] for test in what}
    for number in range(rounds + 1):
        for test in what:
            progress(f"round {number} of {rounds}: {test.name}{' with memory' if test.memory else ''}")
            value = run(engine, test, number)
            if number:
                found[test].append(value)
    return [Speed(test, tuple(values)) for test, values in found.items()]


def run(engine: Engine, test: Test, seed: int) -> float:
    """Tokens per second of one run of a test."""
    window = min(MemoryParams().window_size, engine.config.max_window)
    memory = MemoryParams(window_size=window) if test.memory else None
    requests = [greedy(prompt, test.steps, memory) for prompt in prose(engine, test.streams, test.tokens, seed)]
    ends = [end for events in ask(engine, requests) for end in events if isinstance(end, Finished)]
    if test.steps == 1:
        return test.tokens / ends[0].prompt_seconds
    # the last stream to start decodes while all the others do: its rate is that of the full batch
    return len(ends) * (test.steps - 1) / min(end.decode_seconds for end in ends)


def greedy(prompt: Sequence[int], steps: int, memory: MemoryParams | None = None) -> GenerationRequest:
    """A greedy request of fixed length that takes nothing from earlier ones."""
    return GenerationRequest(
        prompt=prompt,
        max_tokens=steps,
        sampling=SamplingParams(temperature=0.0),
        ignore_eos=True,
        reuse=False,
        memory=memory,
    )


def prose(engine: Engine, streams: int, length: int, seed: int) -> Iterator[list[int]]:
    """Tokens of running text, a place of its own for every stream and seed."""
    tokens = engine.tokenizer.encode(probe_filler(), add_special=False, parse_special=False)
    for stream in range(streams):
        start = (seed * 7919 + stream * 997) % len(tokens)
        yield (tokens[start:] + tokens * (length // len(tokens) + 1))[:length]
