"""What every response format has in common: token counts, timings, memory statistics, and the builders' interface."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from atlas_jax.engine.api import Delta, Finished, MemoryStats, Prompt, TokenInfo
from server.schemas.atlas import AtlasStats, TokenGate, state_fields
from server.schemas.usage import PromptTokensDetails, Timings, Usage

FinishReason = Literal["stop", "length"]
"""Of the engine; a chat that has called tools says so in its place."""


@dataclass(frozen=True, slots=True)
class Identification:
    """What every chunk of one response repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, *, model: str, fingerprint: str) -> Identification:
        """A fresh one; the id begins with the prefix."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, f"fp_{fingerprint[:12]}")


def new_id(prefix: str) -> str:
    """A name nobody else has."""
    return f"{prefix}_{uuid.uuid4().hex}"


@dataclass(slots=True)
class Outcome:
    """What one sequence has produced."""

    deltas: list[Delta] = field(default_factory=list)
    prompt: tuple[TokenInfo, ...] = ()
    finished: Finished | None = None
    embedding: np.ndarray | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[TokenInfo]:
        """All of its tokens."""
        return [token for delta in self.deltas for token in delta.tokens]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What rides on the last chunk, and in a whole response; `stop` is the stop string that has matched, or None."""

    timings: Timings
    usage: Usage
    atlas_stats: AtlasStats | UnsetType = UNSET
    stop: str | None = None


class ResponseBuilder(Protocol):
    """Turns the engine's events into the structs of one API."""

    def chunks(self, index: int, event: Delta | Prompt) -> Sequence[msgspec.Struct]:
        """Chunks for new text of sequence `index`."""

    def end(self, index: int, reason: FinishReason, ending: Ending | None) -> Sequence[msgspec.Struct]:
        """Chunks that finish sequence `index`; with `ending` when it is the last one."""

    def usage(self, usage: Usage) -> msgspec.Struct:
        """The chunk after the last, if the client asked for token counts."""

    def whole(self, outcomes: Sequence[Outcome], usage: Usage, ending: Ending) -> msgspec.Struct:
        """The response of a request that is not a stream."""


def finish_reason(finished: Finished) -> FinishReason:
    """The reason a client sees."""
    return "length" if finished.reason == "length" else "stop"


def finite(logprob: float) -> float:
    """A log-probability JSON can hold; OpenAI writes −9999 for a token that cannot occur."""
    return logprob if math.isfinite(logprob) else -9999.0


def token_gates(tokens: Sequence[TokenInfo]) -> list[TokenGate] | UnsetType:
    """The gates of an answer's tokens that are part of its text; nothing where none were asked for."""
    found = [
        TokenGate(
            token=one.data.decode(errors="replace"), bytes=list(one.data), gate=round(min(max(one.gate, 0.0), 1.0), 4)
        )
        for one in tokens
        if one.gate is not None and not one.hidden
    ]
    return found or UNSET


def usage_of(finished: Mapping[int, Finished], choices: int) -> Usage:
    """Token counts of all sequences; a prompt counts once, however many choices it has."""
    prompts = [done for index, done in finished.items() if index % choices == 0]
    prompt_tokens = sum(done.prompt_tokens for done in prompts)
    completion_tokens = sum(done.completion_tokens for done in finished.values())
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(done.cached_tokens for done in prompts)),
    )


def timings_of(finished: Iterable[Finished]) -> Timings:
    """Where the engine's time went, summed over all sequences."""
    ended = list(finished)
    cached = sum(done.cached_tokens for done in ended)
    read = sum(done.prompt_tokens for done in ended) - cached
    written = sum(done.completion_tokens for done in ended)
    drafted = sum(done.drafted_tokens for done in ended)
    prompt_ms = sum(done.prompt_seconds for done in ended) * 1000
    decode_ms = sum(done.decode_seconds for done in ended) * 1000
    return Timings(
        cache_n=cached,
        prompt_n=read,
        prompt_ms=round(prompt_ms, 3),
        prompt_per_token_ms=_ratio(prompt_ms, read),
        prompt_per_second=_ratio(read * 1000, prompt_ms),
        predicted_n=written,
        predicted_ms=round(decode_ms, 3),
        predicted_per_token_ms=_ratio(decode_ms, written),
        predicted_per_second=_ratio(written * 1000, decode_ms),
        draft_n=drafted or UNSET,
        draft_n_accepted=sum(done.accepted_tokens for done in ended) if drafted else UNSET,
    )


def _ratio(value: float, by: float) -> float:
    return round(value / by, 3) if by else 0.0


def atlas_stats_of(finished: Mapping[int, Finished], choices: int) -> AtlasStats | UnsetType:
    """Memory statistics of the sequences that used it: means of the ratios, sums of the counts.

    The history and the state are those of the first sequence, which goes on as the session; reused tokens count as in
    `usage_of`.
    """
    used = {index: finished[index].memory for index in sorted(finished)}
    stats: list[MemoryStats] = [one for one in used.values() if one is not None]
    if not stats:
        return UNSET
    count = len(stats)
    return AtlasStats(
        memory_utilization=sum(one.memory_utilization for one in stats) / count,
        window_fill_ratio=sum(one.window_fill_ratio for one in stats) / count,
        kept_pairs=stats[0].kept_pairs,
        kept_pairs_capacity=stats[0].kept_pairs_capacity,
        **state_fields(stats[0].state),
        omega_loss=sum(one.omega_loss for one in stats) / count,
        muon_iterations=sum(one.muon_iterations for one in stats),
        blend_ratio_actual=sum(one.blend_ratio_actual for one in stats) / count,
        tokens_absorbed=sum(one.tokens_absorbed for one in stats),
        session_id=next((one.session_id for one in stats if one.session_id is not None), None),
        cache_hit=any(one.cache_hit for one in stats),
        history=stats[0].history,
        tokens_reused=sum(one.tokens_reused for index, one in used.items() if one is not None and index % choices == 0),
        writes_skipped=sum(one.writes_skipped for one in stats),
        degraded=next((one.degraded for one in stats if one.degraded is not None), None),
    )
