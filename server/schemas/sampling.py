"""The request fields that completions and chat completions share."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from atlas_jax.engine.api import MAX_LOGIT_BIAS
from atlas_jax.engine.config import LORA_SCALE
from server.schemas.atlas import AtlasOptions

TokenCount = Annotated[int, Meta(ge=-1, le=1 << 31, description="Most tokens to generate; -1 means no limit")]
INT64 = 1 << 63
Temperature = Annotated[float, Meta(ge=0, le=100, description="0 is greedy")]
TopK = Annotated[int, Meta(ge=-1, le=1 << 31, description="0 and -1 keep every token")]
Fraction = Annotated[float, Meta(ge=0, le=1)]
RepeatPenalty = Annotated[float, Meta(gt=0, le=10)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class LoraScale(Struct, kw_only=True, frozen=True):
    """How far one LoRA adapter is used."""

    id: Annotated[int, Meta(ge=0, le=1 << 20, description="Of GET /lora-adapters")]
    scale: Annotated[float, Meta(ge=-LORA_SCALE, le=LORA_SCALE, description="0 leaves the adapter out")]


LoraScales = Annotated[
    list[LoraScale], Meta(max_length=1024, description="LoRA adapters to use; one that is not named has scale 0")
]


class StreamOptions(Struct, kw_only=True, frozen=True):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(Struct, kw_only=True, frozen=True):
    """Model, sampling, length and memory of one request; null is the same as absent everywhere.

    Sampling fields that are absent take the server's defaults, which `GET /props` shows.
    """

    model: Annotated[str, Meta(max_length=512)] | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: TopK | None = None
    min_p: Fraction | None = None
    typical_p: Fraction | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Meta(ge=-100, le=100)]],
            Meta(
                max_length=MAX_LOGIT_BIAS,
                description="Token id (as a decimal string) to the bias added to its logit; -100 bans, 100 forces",
            ),
        ]
        | None
    ) = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1, description="-1 draws one")] | None = None
    stop: (
        Annotated[str, Meta(max_length=1024)]
        | Annotated[list[Annotated[str, Meta(max_length=1024)]], Meta(max_length=16)]
        | None
    ) = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: TokenCount | None = None
    n_predict: Annotated[int, Meta(ge=-1, le=1 << 31, description="Another name for max_tokens")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    user: Annotated[str, Meta(max_length=1024)] | None = None
    lora: LoraScales | None = None
    atlas: AtlasOptions | None = None
