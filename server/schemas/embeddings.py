"""`POST /v1/embeddings`, and `/embedding` and `/embeddings` as llama.cpp's server has them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

# One array member only: msgspec cannot tell list[str] from list[int] before it has looked inside.
Texts = str | Annotated[list[int | str | list[int]], Meta(min_length=1, max_length=1 << 21)]


class EmbeddingsRequest(Struct, kw_only=True, frozen=True):
    """Texts to embed: a string, token ids, or a list of either."""

    input: Texts
    model: Annotated[str, Meta(max_length=512)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 20, description="Leave all but the first numbers out")] | None = None
    user: Annotated[str, Meta(max_length=1024)] | None = None


class LlamaEmbeddingsRequest(Struct, kw_only=True, frozen=True):
    """The same in llama.cpp's words; `content` is another name of `input`."""

    content: Texts | None = None
    input: Texts | None = None
    model: Annotated[str, Meta(max_length=512)] | None = None
    embd_normalize: Annotated[int, Meta(ge=2, le=2, description="2, the Euclidean norm")] | None = None


class Embedding(Struct, kw_only=True, frozen=True):
    """The embedding of one text: numbers, or base64 of 32-bit floats, least significant byte first."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(Struct, kw_only=True, frozen=True):
    """Token counts of all texts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct, kw_only=True, frozen=True):
    """The embeddings, in the order of the texts."""

    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"


class LlamaEmbedding(Struct, kw_only=True, frozen=True):
    """One text's embedding, alone in a list."""

    index: int
    embedding: list[list[float]]
