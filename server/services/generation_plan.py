"""What is to be generated: a request after all checks, and the engine's requests that it becomes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atlas_jax.engine.api import ChatFrame, GenerationRequest, Pooling, SamplingParams
from server.services.memory_options import MemoryPlan
from server.services.response_builder import ResponseBuilder
from server.services.sampling import MAX_SEED
from server.services.wire import OPENAI, Wire

_UNKNOWN_LENGTH = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationPlan:
    """What is to be generated, checked and tokenised.

    Attributes:
      prompts: token ids of each prompt.
      choices: sequences a prompt.
      prompt_logprobs: None, or how many alternatives for every prompt token.
      grammar: what every answer must match, or None.
      shown: names of control tokens that are part of the answers' text.
      lora: a scale for each LoRA adapter, or None where nothing is said of them.
      chat: what is known of the prompts if they are chats of a session, else None.
      pooling: how the prompts are embedded, or None where they are answered.
      wire: how a stream is written.
      field: what the client calls its prompts.
      commit: done when the answer is complete, before the client is told so.
    """

    prompts: Sequence[Sequence[int]]
    choices: int
    sampling: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    reuse: bool
    grammar: Any
    prompt_logprobs: int | None
    memory: MemoryPlan
    stream: bool
    include_usage: bool
    builder: ResponseBuilder
    shown: frozenset[str] = frozenset()
    lora: tuple[float, ...] | None = None
    chat: ChatFrame | None = None
    pooling: Pooling | None = None
    wire: Wire = OPENAI
    field: str = "prompt"
    commit: Callable[[], Awaitable[None]] | None = None

    def requests(self, owner: str, longest: int) -> list[GenerationRequest]:
        """One engine request a sequence of at most `longest` tokens, choice by choice within prompt by prompt.

        Only the very first sequence goes on as the session; seeds differ between choices, or all would be the same.
        """
        out: list[GenerationRequest] = []
        for prompt in self.prompts:
            for choice in range(self.choices):
                sampling = self.sampling
                if choice and sampling.seed is not None:
                    sampling = replace(sampling, seed=(sampling.seed + choice) & MAX_SEED)
                out.append(
                    GenerationRequest(
                        prompt=prompt,
                        max_tokens=longest if self.max_tokens is None else min(self.max_tokens, longest),
                        sampling=sampling,
                        stop=self.stop,
                        ignore_eos=self.ignore_eos,
                        reuse=self.reuse,
                        grammar=self.grammar,
                        shown=self.shown,
                        prompt_logprobs=self.prompt_logprobs,
                        choice=len(out),
                        owner=owner,
                        lora=self.lora,
                        chat=self.chat,
                        pooling=self.pooling,
                        memory=self.memory.params,
                    )
                )
        return out

    def estimate(self, longest: int) -> int:
        """Tokens this request may use, for the token limit."""
        length = min(_UNKNOWN_LENGTH if self.max_tokens is None else self.max_tokens, longest)
        return sum(len(prompt) + length * self.choices for prompt in self.prompts)
