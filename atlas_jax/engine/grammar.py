"""Answers that must be JSON: which tokens may come next, worked out by llguidance between two steps.

A schema is a stranger's: it is compiled under llguidance's limits on size and fuel, with references to other documents
never fetched, and what exceeds them is refused or ends that one request.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas_jax.engine.api import EngineError, InvalidRequest
from atlas_jax.gguf import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_BYTES = 1 << 18
_WHITESPACE = "[ \\n\\t]{0,16}"
"""Between two parts of a JSON text. Without a bound a small model goes on making blank lines until its tokens are used up."""


class Grammar:
    """What an answer must match; compiled once, used by any number of answers."""

    def __init__(self, start: LLMatcher) -> None:
        """Use `Grammars.json`."""
        self._start = start

    def begin(self) -> Constraint:
        """A new answer."""
        return Constraint(self._start.deep_copy())


class Constraint:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        """Use `Grammar.begin`."""
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def allow(self, into: np.ndarray) -> None:
        """Writes which tokens may come next.

        Args:
          into: int32 [words], one bit per token, contiguous.

        Raises:
          EngineError: working it out took more than it may.
        """
        self._matcher.unsafe_compute_mask_ptr(into.ctypes.data, into.nbytes)
        self._check()

    def take(self, token: int) -> None:
        """Goes on by a token; raises EngineError if it may not come next."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"The answer's grammar failed: {_brief(self._matcher.get_error())}")


class Grammars:
    """Compiles grammars for one tokenizer; thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON texts that a schema allows; milliseconds, and a second once for the tokenizer.

        Raises:
          InvalidRequest: the schema is wrong, too large, or uses what llguidance does not know.
        """
        try:
            text = json.dumps(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest("the JSON schema is nested too deep", param="response_format") from error
        if len(text) > MAX_SCHEMA_BYTES:
            raise InvalidRequest(f"the JSON schema exceeds {MAX_SCHEMA_BYTES} bytes", param="response_format")
        try:
            from llguidance import LLMatcher
        except ImportError as error:  # an extra of its own would be one more thing to know; the server's has it
            raise InvalidRequest("JSON answers need the package llguidance", param="response_format") from error
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
            matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
            trial = matcher.deep_copy()
            trial.compute_bitmask()  # a schema that allows nothing, or too much, says so here
            complaint = matcher.get_error() or trial.get_error()
        except ValueError as error:
            complaint = str(error)
        if complaint:
            raise InvalidRequest(f"JSON schema: {_brief(complaint)}", param="response_format")
        return Grammar(matcher)

    def _vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._known is None:
                ends = sorted(self._tokenizer.eog_ids)
                self._known = LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer, ends[0])), eos_token=ends)
            return self._known


class _Vocabulary:
    """The tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = end
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in ids]
        self.special_token_ids = [token for token in ids if tokenizer.is_special(token)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)


def _brief(message: str) -> str:
    return (message.strip().splitlines() or ["no reason given"])[0][:200]
