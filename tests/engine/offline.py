"""Asking an engine and waiting for what it says."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas_jax.engine import Engine
from atlas_jax.engine.api import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    MemoryParams,
    Prompt,
    SamplingParams,
    SessionKey,
    TokenInfo,
)
from tests.patience import PATIENCE


@dataclass
class Answer:
    """What came back for one request."""

    events: list[Event] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def infos(self) -> list[TokenInfo]:
        return [info for event in self.events if isinstance(event, Delta) for info in event.tokens]

    @property
    def tokens(self) -> list[int]:
        return [info.token for info in self.infos]

    @property
    def prompt(self) -> Prompt:
        return next(event for event in self.events if isinstance(event, Prompt))

    @property
    def end(self) -> Finished:
        last = self.events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Finished)
        return last


def ask_all(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Submits requests together and waits for all of them."""
    answers = [Answer() for _ in requests]
    ended = threading.Semaphore(0)

    def listener(answer: Answer) -> Any:
        def listen(event: Event) -> None:
            answer.events.append(event)
            if isinstance(event, Finished | Failed):
                ended.release()

        return listen

    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, listener(answer))
    for _ in requests:
        assert ended.acquire(timeout=PATIENCE), "a request did not end"
    for answer in answers:
        assert isinstance(answer.end, Finished)
        assert sum(isinstance(event, Finished | Failed) for event in answer.events) == 1
    return answers


def ask(engine: Engine, request: GenerationRequest) -> Answer:
    """Submits one request and waits for its answer."""
    return ask_all(engine, [request])[0]


def request(
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    memory: MemoryParams | None = None,
    temperature: float = 0.0,
    logprobs: int | None = 3,
    **more: Any,
) -> GenerationRequest:
    """A greedy request that ends by length, with log-probabilities."""
    settings = {name: more.pop(name) for name in list(more) if name in SamplingParams.__dataclass_fields__}
    sampling = SamplingParams(temperature=temperature, logprobs=logprobs, **settings)
    more.setdefault("ignore_eos", True)
    return GenerationRequest(prompt=list(prompt), max_tokens=max_tokens, sampling=sampling, memory=memory, **more)


def memory(session: str | None = None, owner: str = "owner", **more: Any) -> MemoryParams:
    """A memory with a window of one page and few kept pairs, so that little text overflows both."""
    more.setdefault("window_size", 128)
    more.setdefault("kept_pairs", 100)
    return MemoryParams(session=None if session is None else SessionKey(owner, session), **more)


def words(seed: int, length: int, vocab: int = 340) -> list[int]:
    """Random tokens, none of them special."""
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()
