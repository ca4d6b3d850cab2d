"""The endpoints clients of llama.cpp's server know."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from server.schemas.atlas import AtlasStats, FittingProgress
from server.schemas.chat import Messages, Tool
from server.schemas.sampling import LoraScales
from server.schemas.shape import ShapedFields
from server.schemas.usage import Timings


class Health(Struct, kw_only=True, frozen=True):
    """Answer of the health checks; `/ready` has `fitting` while the model is served without the memory it will have."""

    status: str
    fitting: FittingProgress | UnsetType = UNSET


class TokenizeRequest(Struct, kw_only=True, frozen=True):
    """Text to split into tokens."""

    content: str
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class TokenPiece(Struct, kw_only=True, frozen=True):
    """One token; the piece is a list of bytes where it is not valid UTF-8 on its own."""

    id: int
    piece: str | list[int]


class TokenizeResponse(Struct, kw_only=True, frozen=True):
    """Token ids, or objects with their pieces."""

    tokens: list[int | TokenPiece]


class DetokenizeRequest(Struct, kw_only=True, frozen=True):
    """Token ids to join into text."""

    tokens: Annotated[list[int], Meta(max_length=1 << 21)]


class DetokenizeResponse(Struct, kw_only=True, frozen=True):
    """The text of the tokens."""

    content: str


class ApplyTemplateRequest(Struct, kw_only=True, frozen=True):
    """A conversation to write out with the model's chat template."""

    messages: Messages
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ApplyTemplateResponse(Struct, kw_only=True, frozen=True):
    """The text the model would read."""

    prompt: str


Probabilities = Annotated[int, Meta(ge=0, le=20, description="Most likely tokens to tell of at every position")]


class LlamaCompletionRequest(ShapedFields, kw_only=True, frozen=True):
    """A text to continue: a string or token ids; without a limit as long as the model goes on."""

    # One array member only: msgspec cannot tell list[str] from list[int] before it has looked inside.
    prompt: str | Annotated[list[int | str | list[int]], Meta(max_length=1 << 21)] | None = None
    n_probs: Probabilities | None = None
    return_tokens: bool | None = None


class InfillRequest(ShapedFields, kw_only=True, frozen=True):
    """A gap to fill: what comes before it, what follows, and what the answer begins with."""

    input_prefix: str = ""
    input_suffix: str = ""
    prompt: str | None = None
    n_probs: Probabilities | None = None
    return_tokens: bool | None = None


class LlamaSettings(Struct, kw_only=True, frozen=True):
    """What an answer was generated with."""

    n_ctx: int
    model: str
    n_predict: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: list[str]
    ignore_eos: bool
    stream: bool
    n_probs: int
    grammar: str


class LlamaTopToken(Struct, kw_only=True, frozen=True):
    """One alternative at one position."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class LlamaToken(LlamaTopToken, kw_only=True, frozen=True):
    """One generated token and its alternatives."""

    top_logprobs: list[LlamaTopToken]


class LlamaCompletion(Struct, kw_only=True, frozen=True):
    """A continuation or, in a stream, the next piece of one; the last has the rest of the fields."""

    content: str
    stop: bool
    index: int = 0
    id_slot: int = -1
    tokens: list[int] = []
    completion_probabilities: list[LlamaToken] | UnsetType = UNSET
    model: str | UnsetType = UNSET
    prompt: str | UnsetType = UNSET
    generation_settings: LlamaSettings | UnsetType = UNSET
    tokens_predicted: int | UnsetType = UNSET
    tokens_evaluated: int | UnsetType = UNSET
    tokens_cached: int | UnsetType = UNSET
    truncated: bool | UnsetType = UNSET
    stop_type: Literal["eos", "limit", "word"] | UnsetType = UNSET
    stopping_word: str | UnsetType = UNSET
    has_new_line: bool | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    atlas_stats: AtlasStats | UnsetType = UNSET


class RerankRequest(Struct, kw_only=True, frozen=True):
    """Texts to put in the order of a question."""

    query: str
    documents: Annotated[list[str], Meta(min_length=1, max_length=2048)]
    model: Annotated[str, Meta(max_length=512)] | None = None
    top_n: Annotated[int, Meta(ge=1)] | None = None


class RerankedText(Struct, kw_only=True, frozen=True):
    """How well a text answers the question."""

    index: int
    relevance_score: float


class Reranked(Struct, kw_only=True, frozen=True):
    """Texts in the order of a question, as a model that ranks them would have it."""

    results: list[RerankedText]


class LoraAdapter(Struct, kw_only=True, frozen=True):
    """A LoRA adapter and the scale of requests that say nothing of it; `path` is the file's name, never a path."""

    id: int
    path: str
    scale: float
    task_name: str
    prompt_prefix: str


class LoraChange(Struct, kw_only=True, frozen=True):
    """The body of a change of scales, which is the list alone."""

    lora: LoraScales


class LoraChanged(Struct, kw_only=True, frozen=True):
    """Answer to a change of scales."""

    success: bool


class Slot(Struct, kw_only=True, frozen=True):
    """One decode slot; never any text."""

    id: int
    is_processing: bool
    n_prompt_tokens: int
    n_decoded: int
    session: bool
    n_ctx: int


class SamplingDefaults(Struct, kw_only=True, frozen=True):
    """What a request gets for the sampling fields it leaves out."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    n_predict: int


class GenerationSettings(Struct, kw_only=True, frozen=True):
    """`n_ctx` is the model's trained context; with a memory a session may be longer."""

    n_ctx: int
    params: SamplingDefaults


class Props(Struct, kw_only=True, frozen=True):
    """Answer of `GET /props`; `model_path` is the model's name, never a path."""

    default_generation_settings: GenerationSettings
    total_slots: int
    model_alias: str
    model_path: str
    modalities: dict[str, bool]
    build_info: str
