"""What an answer must look like, in one of the languages there are for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerShape:
    """What an answer must match.

    Attributes:
      kind: the language of `wanted`: "json" is a JSON schema, "regex" an expression of Rust's `regex` that matches the whole
        answer, "choice" a list of answers, "grammar" a text in GBNF or in llguidance's dialect of Lark.
      field: of the request that it comes from, for errors.
    """

    kind: Literal["json", "regex", "choice", "grammar"] = "json"
    wanted: Any
    field: str = "response_format"

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON schema, if it is one."""
        return self.wanted if self.kind == "json" else None


def lark_of(shape: AnswerShape) -> str:
    """Another shape than a JSON schema in llguidance's dialect of Lark; raises ValueError where it is not well formed."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if shape.kind == "choice":
        return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in shape.wanted)
    if shape.kind == "regex":
        made = json.loads(LLMatcher.grammar_from_regex(shape.wanted))
        text: str = made["grammars"][0]["lark_grammar"]
        return text
    try:
        return any_to_lark(shape.wanted)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # the converter has no class of errors of its own for all that may be wrong
        raise ValueError(f"it is no GBNF: {error}") from None
