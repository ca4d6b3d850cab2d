"""What an answer must look like, under the names that clients of OpenAI, vLLM, SGLang and llama.cpp use."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from server.schemas.sampling import SamplingFields

Choices = Annotated[list[str], Meta(max_length=4096)]
Schema = str | dict[str, Any]


class StructuredOutputs(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One of a JSON schema, an expression, a list of answers and a grammar, as vLLM has them.

    The fields after those are switches of vLLM's backends, and hints.
    """

    json: Schema | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class ShapedFields(SamplingFields, kw_only=True, frozen=True):
    """Sampling, and what the answer must match; of the latter one request has one."""

    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[Schema, Meta(description="A JSON schema, or the text of one")] | None = None
    guided_regex: Annotated[str, Meta(description="An expression that the whole answer matches")] | None = None
    guided_choice: Choices | None = None
    guided_grammar: Annotated[str, Meta(description="In GBNF, or in llguidance's dialect of Lark")] | None = None
    grammar: Annotated[str, Meta(description="llama.cpp's name of guided_grammar")] | None = None
    ebnf: Annotated[str, Meta(description="SGLang's name of guided_grammar")] | None = None
    json_schema: Annotated[Schema, Meta(description="llama.cpp's and SGLang's name of guided_json")] | None = None
    regex: Annotated[str, Meta(description="SGLang's name of guided_regex")] | None = None
