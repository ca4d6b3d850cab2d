"""An engine as the tasks use it: losses of a text, and sessions that read once and are asked many times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import (
    Delta,
    Finished,
    GenerationRequest,
    InvalidRequest,
    MemoryParams,
    ModelInfo,
    Prompt,
    SamplingParams,
    SessionKey,
    SessionNotFound,
    Tokenizer,
)
from atlas_jax.engine.offline import ask, text_of
from atlas_jax.evaluation.arms import FULL, NEAREST, WINDOW, Arm
from atlas_jax.evaluation.measures import NotPossible
from atlas_jax.evaluation.nearest import NearestNeighbours

_OWNER = "evaluation"
_FORCE = 100.0
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
      tokens: its ids, without the one that ended it.
    """

    text: str
    tokens: tuple[int, ...]
    end: Finished

    @property
    def ended(self) -> bool:
        """Whether the model ended the answer itself."""
        return self.end.reason == "stop"


class Session:
    """One session: what it has read, and questions to it that leave no trace."""

    def __init__(self, bench: Bench, arm: Arm, tokens: int, key: SessionKey) -> None:
        self._bench, self._arm, self._tokens, self.key = bench, arm, tokens, key

    def read(self, prompt: Sequence[int]) -> Finished:
        """Reads on."""
        return self._bench.run(prompt, self._arm.params(self._tokens, session=self.key), max_tokens=0).end

    def go_on(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Reads on and writes on."""
        return self._bench.run(prompt, self._arm.params(self._tokens, session=self.key), max_tokens=max_tokens)

    def ask(self, question: Sequence[int], max_tokens: int, **how: Any) -> Answer:
        """Goes on greedily after the question; the session stays as it was."""
        return self._bench.run(question, self._params(False), max_tokens=max_tokens, **how)

    def score(self, question: Sequence[int], completion: Sequence[int]) -> float:
        """Nats of a completion after the question; the session stays as it was."""
        total = 0.0
        for index, token in enumerate(completion):
            total += self._bench.chance([*question, *completion[:index]], token, memory=self._params(False))
        return total

    def say(self, messages: Messages, max_tokens: int, *, teach: bool, forced: int | None = None) -> Answer:
        """Answers a conversation, of which the client sends all, as a chat completion does.

        Args:
          forced: a token the answer consists of, whatever the model would say.
        """
        engine = self._bench.engine
        return self._bench.run(
            self._bench.chat_tokens(messages),
            self._params(teach),
            max_tokens=max_tokens,
            chat=engine.chat_frame(messages),
            bias={} if forced is None else {forced: _FORCE},
            to_the_end=False,
        )

    def _params(self, teach: bool) -> MemoryParams:
        return self._arm.params(self._tokens, session=self.key, teach=teach)


class Bench:
    """An engine, and how the tasks ask it.

    Args:
      token_bytes: of a token's keys and values.
    """

    def __init__(self, engine: Engine, token_bytes: int) -> None:
        self.engine, self.token_bytes = engine, token_bytes
        self._nearest: NearestNeighbours | None = None
        self._sessions = 0

    @property
    def model(self) -> ModelInfo:
        """Facts of the model."""
        return self.engine.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def tokens(self, text: str, *, begin: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          begin: as the beginning of all, not within another text.
        """
        return self.tokenizer.encode(text, add_special=begin, parse_special=False)

    def chat_tokens(self, messages: Messages) -> list[int]:
        """Token ids of a conversation up to where the answer begins. Raises NotPossible."""
        try:
            return self.engine.render_chat(messages)
        except InvalidRequest as error:
            raise NotPossible(f"the model takes no such conversation: {error}") from error

    def losses(self, tokens: Sequence[int], arm: Arm) -> npt.NDArray[np.float64]:
        """Nats of every token; 0 for the first, which nothing is said of. Raises NotPossible."""
        if arm.kind == NEAREST:
            return self._neighbours(arm).losses(tokens)
        self.check(arm, len(tokens))
        memory = None if arm.kind == FULL else arm.params(len(tokens))
        (events,) = ask(
            self.engine,
            [GenerationRequest(prompt=tokens, max_tokens=0, prompt_logprobs=0, memory=memory, reuse=False)],
        )
        scored = next(event for event in events if isinstance(event, Prompt)).tokens
        return np.array([-(token.logprob or 0.0) for token in scored])

    def _neighbours(self, arm: Arm) -> NearestNeighbours:
        if self._nearest is None:
            window = Arm(WINDOW, arm.options)
            self._nearest = NearestNeighbours(
                self.engine.config.find_model(),
                lambda tokens: self.losses(tokens, window),
                self.tokens,
                arm.options.window_size,
            )
        return self._nearest

    def check(self, arm: Arm, tokens: int) -> None:
        """Whether an arm can hold so much text, and answer; raises NotPossible."""
        if arm.kind == NEAREST:
            raise NotPossible("nearest neighbours are a baseline for losses: they do not write")
        if arm.kind == FULL and tokens > self.model.context_length:
            raise NotPossible(f"full attention of {tokens} tokens is past the context of {self.model.context_length}")

    @contextmanager
    def session(self, arm: Arm, tokens: int) -> Iterator[Session]:
        """A session that will read so many tokens in all, and is gone afterwards. Raises NotPossible."""
        self.check(arm, tokens)
        self._sessions += 1
        key = SessionKey(_OWNER, f"unit {self._sessions}")
        try:
            yield Session(self, arm, tokens, key)
        finally:
            with suppress(SessionNotFound):  # a unit that failed before anything was read
                self.engine.sessions.delete(key.owner, key.session_id)

    def answer(self, prompt: Sequence[int], arm: Arm, max_tokens: int, **how: Any) -> Answer:
        """Goes on greedily after a prompt without a session. Raises NotPossible."""
        self.check(arm, len(prompt) + max_tokens)
        memory = None if arm.kind == FULL else arm.params(len(prompt) + max_tokens)
        return self.run(prompt, memory, max_tokens=max_tokens, **how)

    def chance(self, prompt: Sequence[int], token: int, *, memory: MemoryParams | None) -> float:
        """Nats of one token after a prompt: it is forced, and its probability is that before it was.

        Raises:
          AssertionError: the engine drew another.
        """
        sampling = SamplingParams(temperature=0.0, logit_bias={token: _FORCE}, logprobs=0)
        (events,) = ask(
            self.engine,
            [GenerationRequest(prompt=prompt, max_tokens=1, sampling=sampling, ignore_eos=True, memory=memory)],
        )
        (info,) = (info for event in events if isinstance(event, Delta) for info in event.tokens)
        if info.token != token or info.logprob is None:
            raise AssertionError("a forced token was not drawn")
        return -info.logprob

    def run(
        self,
        prompt: Sequence[int],
        memory: MemoryParams | None,
        *,
        max_tokens: int,
        to_the_end: bool = True,
        stop: Sequence[str] = (),
        bias: Mapping[int, float] | None = None,
        **more: Any,
    ) -> Answer:
        """One greedy request.

        Args:
          to_the_end: until `max_tokens`, whatever the model would end at.
        """
        sampling = SamplingParams(temperature=0.0, logit_bias=bias or {}, logprobs=0)
        request = GenerationRequest(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            ignore_eos=to_the_end,
            stop=stop,
            memory=memory,
            reuse=False,
            **more,
        )
        (events,) = ask(self.engine, [request])
        end = events[-1]
        assert isinstance(end, Finished)
        tokens = [
            info.token for event in events if isinstance(event, Delta) for info in event.tokens if not info.hidden
        ]
        return Answer(text_of(events), tuple(tokens), end)

    def state_bytes(self, arm: Arm) -> tuple[int, int]:
        """Bytes of a session of this arm that has read five windows, in memory and in its file."""
        tokens = 5 * arm.params(0).window_size
        vocabulary = self.model.vocab_size
        some = np.random.default_rng(0).integers(vocabulary // 4, vocabulary // 2, tokens).tolist()
        with self.session(arm, tokens) as session:
            session.read(some)
            listed, _ = self.engine.sessions.list(_OWNER, after=None, limit=1000)
            resident = next(row.bytes for row in listed if row.session_id == session.key.session_id)
            return resident, self.engine.sessions.save_session(_OWNER, session.key.session_id).bytes


def window_of_bytes(size: int, token_bytes: int, *, least: int, most: int) -> int:
    """The largest window, in whole pages, whose keys and values take no more than so many bytes."""
    pages = size // (token_bytes * PAGE)
    return min(max(pages * PAGE, least), most // PAGE * PAGE)
