"""What goes into the engine: one sequence to continue, how it is sampled, and how it uses the ATLAS memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atlas_jax.engine.memory_options import MemoryOptions

Pooling = Literal["mean", "last"]
"""What an embedding is made of: the mean of the last layer's normed states, or the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn; the defaults sample from the model's own distribution.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 keeps every token.
      logit_bias: −100 bans a token and 100 forces it, whatever the temperature; at most `MAX_LOGIT_BIAS` entries.
      seed: None draws one; the seed that was used is in the result.
      logprobs: None for none, k ≥ 0 for the chosen token's log-probability and the k best alternatives.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Whose session: the owner comes from the API key, never from the request body."""

    owner: str
    session_id: str


class MemoryParams(MemoryOptions, kw_only=True, frozen=True):
    """How one request uses the ATLAS memory.

    Attributes:
      session: None gives the request a memory of its own that ends with it.
      regenerate: a prompt the session has been asked before is answered anew: what followed it there is forgotten.
      whole: the prompt is the whole text: whatever else its session holds is forgotten. For who keeps the text himself;
        else the session finds out what the prompt is a part of.
      token_gates: the tokens of the answer come with their gates.
      given: fields the client wrote itself; a session keeps the window, update frequency, layers, degree, budget and number
        of kept pairs it was begun with, and refuses a request that names others, but not one whose defaults differ.
    """

    session: SessionKey | None = None
    regenerate: bool = False
    whole: bool = False
    token_gates: bool = False
    given: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFrame:
    """What the chat template put around the messages of a prompt, and what the messages are.

    Attributes:
      preamble: tokens before the first message that is not a system message; None if that place is not known.
      own: whether the template put them there by itself, and no words of the client's are in them.
      opening, closing: the tokens by which it begins and ends an answer.
      answers: whether there are answers among the messages: the client sends a conversation, not only what is new.
    """

    preamble: tuple[int, ...] | None = None
    own: bool = True
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    answers: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One sequence to continue. `n` choices are n requests with the same prompt and `choice` 0 … n−1.

    Attributes:
      prompt: token ids, at least one.
      max_tokens: None = until a stop, or the end of the context.
      stop: strings that end the text; the text before the match is delivered, the match is not.
      ignore_eos: never end at an end-of-generation token.
      prompt_logprobs: None, or k alternatives for every prompt token (`echo` with `logprobs`).
      pooling: prefill the prompt and deliver its embedding, without an answer and without a memory; None = an answer.
      choice: only choice 0 of a session's request goes on as that session; the others see it and leave no trace.
      owner: whose share of the engine this request uses (fairness, prefix reuse never crosses owners).
      reuse: take what another prompt of this owner that begins the same has left, and leave what this one reads.
      grammar: what the answer must match (`EngineProtocol.answer_grammar`, `EngineProtocol.call_grammar`), or None.
      shown: names of control tokens that are part of the answer's text; others are not.
      lora: a scale for each LoRA adapter that is loaded, in their order; None = those of the engine, or of the session.
      chat: what is known of a prompt that is a chat (`EngineProtocol.chat_frame`); a session then knows its parts.
      memory: None = the plain model.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    pooling: Pooling | None = None
    choice: int = 0
    owner: str = ""
    reuse: bool = True
    grammar: Any = None
    shown: frozenset[str] = frozenset()
    lora: Sequence[float] | None = None
    chat: ChatFrame | None = None
    memory: MemoryParams | None = None

    @property
    def gated(self) -> bool:
        """Whether the answer's tokens come with their gates."""
        return self.memory is not None and self.memory.token_gates

    @property
    def with_tokens(self) -> bool:
        """Whether the answer's text comes with its tokens."""
        return self.sampling.logprobs is not None or self.gated
