"""What no engine can answer is refused before it is queued."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atlas_jax.engine.api import GenerationRequest, InvalidRequest
from atlas_jax.engine.config import LORA_SCALE
from atlas_jax.kernels.sampling import BIAS_SLOTS, TOP_LOGPROBS
from atlas_jax.typing import Int32


def check_request(request: GenerationRequest, *, vocab: int, longest: int, adapters: int) -> Int32[np.ndarray, T]:
    """The prompt as an array.

    Args:
      longest: tokens of a request without memory, prompt and answer.
      adapters: LoRA adapters that are loaded.

    Raises:
      InvalidRequest: what can never succeed, or would crash a compiled step.
    """
    prompt = request.prompt
    if not len(prompt):
        raise InvalidRequest("prompt must hold at least one token", param="prompt")
    try:
        tokens = np.asarray(prompt, np.int64)
    except OverflowError:
        tokens = np.array([-1])
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise InvalidRequest(f"prompt holds token ids outside 0 … {vocab - 1}", param="prompt")
    tokens = tokens.astype("<i4")
    if request.max_tokens is not None and request.max_tokens < 0:
        raise InvalidRequest("max_tokens must not be negative", param="max_tokens")
    sampling = request.sampling
    if len(sampling.logit_bias) > BIAS_SLOTS:
        raise InvalidRequest(f"logit_bias may have at most {BIAS_SLOTS} entries", param="logit_bias")
    if sampling.logit_bias and not 0 <= min(sampling.logit_bias) <= max(sampling.logit_bias) < vocab:
        raise InvalidRequest(f"logit_bias names token ids outside 0 … {vocab - 1}", param="logit_bias")
    for name, wanted in (("logprobs", sampling.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if wanted is not None and not 0 <= wanted <= TOP_LOGPROBS:
            raise InvalidRequest(f"{name} must be between 0 and {TOP_LOGPROBS}", param=name)
    if request.pooling is not None and (request.memory is not None or request.max_tokens != 0):
        raise InvalidRequest("an embedding has neither an answer nor a memory", param="pooling")
    if request.lora is not None:
        check_lora(request.lora, adapters)
    left = longest - len(prompt)
    if request.memory is None and (left < 0 or (left == 0 and request.max_tokens != 0)):
        more = "" if request.pooling is not None else "; a session with memory has no such limit"
        raise InvalidRequest(
            f"This model's maximum context length is {longest} tokens, and the prompt has {len(prompt)}{more}",
            param="prompt",
            code="context_length_exceeded",
        )
    return tokens


def check_lora(scales: Sequence[float], adapters: int) -> None:
    """Raises InvalidRequest unless there is a scale for each of so many LoRA adapters."""
    if len(scales) != adapters:
        raise InvalidRequest(f"lora must have {adapters} scales, one for each adapter, has {len(scales)}", param="lora")
    if not all(abs(scale) <= LORA_SCALE for scale in scales):
        raise InvalidRequest(f"lora must have scales between {-LORA_SCALE:g} and {LORA_SCALE:g}", param="lora")
