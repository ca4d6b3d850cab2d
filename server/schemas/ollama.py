"""Ollama's API: generation in lines of JSON, the models, embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from server.schemas.atlas import AtlasOptions, AtlasStats
from server.schemas.chat import Tool
from server.schemas.embeddings import Texts
from server.schemas.sampling import Fraction, Penalty, RepeatPenalty, Temperature, TopK

ModelName = Annotated[str, Meta(max_length=512)]
Format = str | dict[str, Any]


class OllamaOptions(Struct, kw_only=True, frozen=True):
    """Sampling and length; options that are not among these pass."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Fraction | None = None
    min_p: Fraction | None = None
    typical_p: Fraction | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: (
        Annotated[str, Meta(max_length=1024)]
        | Annotated[list[Annotated[str, Meta(max_length=1024)]], Meta(max_length=16)]
        | None
    ) = None
    num_predict: Annotated[int, Meta(ge=-2, le=1 << 31, description="Most tokens; -1 and -2 mean no limit")] | None = (
        None
    )


class OllamaFunction(Struct, kw_only=True, frozen=True):
    """The function of a call, with its arguments as an object."""

    name: Annotated[str, Meta(max_length=256)]
    arguments: dict[str, Any] = {}


class OllamaToolCall(Struct, kw_only=True, frozen=True):
    """A call of a tool."""

    function: OllamaFunction
    id: Annotated[str, Meta(max_length=256)] | None = None


class OllamaMessage(Struct, kw_only=True, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[str] | None = None
    tool_calls: Annotated[list[OllamaToolCall], Meta(max_length=128)] | None = None
    tool_name: Annotated[str, Meta(max_length=256)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    thinking: str | None = None


class _Asked(Struct, kw_only=True, frozen=True):
    """What both kinds of generation have."""

    model: ModelName
    stream: bool | None = None
    format: Format | None = None
    options: OllamaOptions | None = None
    think: bool | str | None = None
    keep_alive: str | float | None = None
    logprobs: bool | None = None
    atlas: AtlasOptions | None = None


class OllamaChatRequest(_Asked, kw_only=True, frozen=True):
    """A conversation to continue."""

    messages: Annotated[list[OllamaMessage], Meta(max_length=8192)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None


class OllamaGenerateRequest(_Asked, kw_only=True, frozen=True):
    """A question to answer or, with `raw`, a text to continue."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    images: list[str] | None = None
    template: str | None = None
    context: list[int] | None = None


class OllamaEmbedRequest(Struct, kw_only=True, frozen=True):
    """Texts to embed."""

    model: ModelName
    input: Texts
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


class OllamaEmbeddingsRequest(Struct, kw_only=True, frozen=True):
    """One text to embed, as clients asked before there was `/api/embed`."""

    model: ModelName
    prompt: str
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


class OllamaShowRequest(Struct, kw_only=True, frozen=True):
    """Which model to describe."""

    model: ModelName | None = None
    name: ModelName | None = None
    verbose: bool | None = None


class _Line(Struct, kw_only=True, frozen=True):
    """What every line has; counts and durations, in nanoseconds, come with the last."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET


class OllamaCalledFunction(Struct, kw_only=True, frozen=True):
    """The function of a call, with its arguments as an object."""

    index: int
    name: str
    arguments: dict[str, Any]


class OllamaCalled(Struct, kw_only=True, frozen=True):
    """A call of a tool."""

    id: str
    function: OllamaCalledFunction


class OllamaAnswer(Struct, kw_only=True, frozen=True):
    """The assistant's message, or the next piece of it."""

    content: str
    role: Literal["assistant"] = "assistant"
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaCalled] | UnsetType = UNSET


class OllamaChat(_Line, kw_only=True, frozen=True):
    """One line of an answer, or all of it."""

    message: OllamaAnswer


class OllamaGenerated(_Line, kw_only=True, frozen=True):
    """One line of an answer, or all of it."""

    response: str
    thinking: str | UnsetType = UNSET


class OllamaEmbedded(Struct, kw_only=True, frozen=True):
    """Embeddings, in the order of the texts."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbedding(Struct, kw_only=True, frozen=True):
    """The embedding of one text."""

    embedding: list[float]


class OllamaDetails(Struct, kw_only=True, frozen=True):
    """Facts of a model."""

    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    format: Literal["gguf"] = "gguf"
    parent_model: str = ""


class OllamaModel(Struct, kw_only=True, frozen=True):
    """One model."""

    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    modified_at: str | UnsetType = UNSET
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET


class OllamaModels(Struct, kw_only=True, frozen=True):
    """Every model."""

    models: list[OllamaModel]


class OllamaShown(Struct, kw_only=True, frozen=True):
    """One model, described."""

    details: OllamaDetails
    model_info: dict[str, str | int]
    capabilities: list[str]
    modified_at: str
    modelfile: str = ""
    parameters: str = ""
    template: str = ""


class OllamaVersion(Struct, kw_only=True, frozen=True):
    """The server's version."""

    version: str
