"""What chooses tokens: the sampler, and the drafts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.engine.api import SamplingParams
from atlas_jax.engine.runner.step_inputs import sampling_state
from atlas_jax.kernels.sampling import TOP_LOGPROBS, record, sample
from atlas_jax.kernels.speculative_drafter import NONE, draft_tokens, ref_draft_tokens
from benchmarks.accelerator.kernel_case import KernelCase, Pair, on_cpu
from tests.reference.sampling_reference import Settings, distribution

_PROMPT, _GENERATED = (1, 2, 3, 5, 8), (3, 3, 7)
_SETTINGS = (
    Settings(),
    Settings(temperature=0.7, top_k=40),
    Settings(top_p=0.9, min_p=0.05),
    Settings(typical_p=0.6),
    Settings(
        repeat_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        bias={4: 3.0, 6: -100.0},
        prompt=_PROMPT,
        generated=_GENERATED,
    ),
    Settings(temperature=1.5, top_k=60, top_p=0.95, typical_p=0.9, min_p=0.01),
)


def _sampling(vocab: int, copies: int) -> Pair:
    """How far a row's uniform number is from the part of 0 … 1 that its token has, and log-probabilities."""
    random = np.random.default_rng(43)
    kinds = [kind for kind in _SETTINGS for _ in range(copies)]
    scores = (3 * random.standard_normal((len(kinds), vocab))).astype(np.float32)
    position = random.integers(0, 2**20, len(kinds)).astype(np.int32)
    rows = [
        sampling_state(
            SamplingParams(
                temperature=kind.temperature,
                top_k=kind.top_k,
                top_p=kind.top_p,
                min_p=kind.min_p,
                typical_p=kind.typical_p,
                repeat_penalty=kind.repeat_penalty,
                presence_penalty=kind.presence_penalty,
                frequency_penalty=kind.frequency_penalty,
                logit_bias=kind.bias,
                logprobs=TOP_LOGPROBS,
            ),
            vocab,
            int(random.integers(2**63)),
            kind.prompt,
        )
        for kind in kinds
    ]
    state = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *rows)
    tokens = np.asarray([kind.generated or (0,) * len(_GENERATED) for kind in kinds], np.int32)
    drawn = np.asarray([[bool(kind.generated)] * len(_GENERATED) for kind in kinds])

    def run(state: Any, tokens: Any, drawn: Any, scores: Any, position: Any) -> Any:
        return sample(record(state, tokens, drawn), scores, position)

    found = jax.jit(run)(state, *map(jnp.asarray, (tokens, drawn, scores, position)))

    def uniform(seed: Any, position: Any) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.uniform(key, (), jnp.float32)

    numbers = on_cpu(jax.vmap(uniform), state.seed, position)
    nearest = []
    for token, number, logits, kind in zip(np.asarray(found.token), numbers, scores, kinds, strict=True):
        share = distribution(logits, kind)
        end = float(share[: token + 1].sum())
        nearest.append(np.clip(number, end - share[token], end) if share[token] else np.nan)
    wide = scores.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    best = np.argsort(-logprobs, axis=1, kind="stable")[:, :TOP_LOGPROBS]
    wanted = numbers, np.take_along_axis(logprobs, np.asarray(found.token)[:, None], 1)[:, 0], best
    left = np.asarray(nearest), found.logprob, found.top_token
    return (*left, found.top_logprob), (*wanted, np.take_along_axis(logprobs, best, 1))


def _drafts() -> Pair:
    random = np.random.default_rng(24)
    texts = [random.integers(0, 4, 60) for _ in range(4)]
    ring = np.full((4, 128), NONE, np.int32)
    ring[:, :60] = texts
    successor, last = np.full(51, NONE, np.int32), np.full(4, 59, np.int32)
    found = jax.jit(draft_tokens, static_argnums=3)(ring, last, successor, 3)
    return found, np.asarray([ref_draft_tokens(text, successor, 3) for text in texts])


CASES = {
    "sampling": KernelCase(("sampling",), lambda quick: _sampling(*((1000, 4) if quick else (49_152, 20))), 1e-4),
    "drafts": KernelCase(("speculative_drafter",), lambda _: _drafts(), 0.0),
}
