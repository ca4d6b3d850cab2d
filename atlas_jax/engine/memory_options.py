"""The memory's part of the `atlas` object: one schema, from which the server's request, defaults and documents are made.

Every field is here once, with its type, range, default and meaning. No JAX.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from atlas_jax.engine.config import MIN_WINDOW

CacheStrategy = Literal["lru", "lfu", "adaptive"]


class MemoryOptions(Struct, kw_only=True, frozen=True):
    """How a request uses the memory."""

    # Its bounds are checked together with the server's own upper bound, so that one message names both.
    window_size: Annotated[
        int,
        Meta(
            description="Tokens attended exactly: a multiple of the page (128), from 128 to the server's maximum",
            extra_json_schema={"minimum": MIN_WINDOW},
        ),
    ] = 512
    blend_ratio: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="0 window only, 0.5 as fitted (opened further in a chat), 1 memory wherever it has anything to say",
        ),
    ] = 0.5
    memory_budget: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=1 << 40,
                description="Bytes of this session's state, up to the server's: the pairs kept are as many as fit beside "
                "window and memory; null is the server's",
            ),
        ]
        | None
    ) = None
    kept_pairs: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=1 << 20,
                description="Keys and values kept of what has left the window, per KV head and on average per layer; null "
                "keeps as many as memory_budget has room for",
            ),
        ]
        | None
    ) = None
    memory_layers: Annotated[
        int, Meta(ge=1, le=10, description="Transformer layers whose states make the memory's keys, best-ranked first")
    ] = 1
    polynomial_degree: Annotated[int, Meta(ge=1, le=3, description="Degree of the feature map")] = 2
    use_muon: Annotated[
        bool | None,
        Meta(
            description="true Muon (orthogonalised momentum), false plain gradient (OmegaNet), null the exact "
            "minimum-norm solve"
        ),
    ] = None
    # A step twice as long as the line search's no longer lowers the objective; a longer one raises it.
    learning_rate: (
        Annotated[float, Meta(gt=0, lt=0.002, description="Inner step size; 0.001, like null, is the calibrated one")]
        | None
    ) = None
    update_frequency: Annotated[
        int, Meta(ge=1, le=512, description="Tokens per memory write: a multiple of the page (128)")
    ] = 128
    omega_window: Annotated[
        int, Meta(ge=1, le=512, description="Tokens in the objective of one write, at least update_frequency")
    ] = 512
    warmup_tokens: Annotated[
        int, Meta(ge=0, le=1 << 31, description="Tokens written to the memory before it is read")
    ] = 0
    read: Annotated[bool, Meta(description="Whether the memory is read: false learns without using it")] = True
    write: Annotated[bool, Meta(description="Whether the memory is written: false uses it without learning")] = True
    cache_strategy: Annotated[
        CacheStrategy,
        Meta(
            description="What is kept: pairs attended last (lru), most (lfu) or most of late (adaptive); and which idle "
            "sessions leave device and host memory first (adaptive = ARC)"
        ),
    ] = "adaptive"
