"""What answers grammars of tool calls allow, in every family's form."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from atlas_jax.engine.scheduler.detokenizer import Detokenizer
from atlas_jax.gguf import GGUFFile, Tokenizer
from atlas_jax.grammar.answer import Tokens
from atlas_jax.grammar.calls import CallGrammar, CallShape
from atlas_jax.grammar.shape import AnswerShape
from atlas_jax.grammar.wire import CALLS, COMPLETE, MAY_GO_ON, Compiled
from atlas_jax.grammar.worker import Grammar, _compile
from server.tool_calls.choice import _channel_marks
from server.tool_calls.generic import GENERIC
from server.tool_calls.harmony import HARMONY
from server.tool_calls.hermes import HERMES
from server.tool_calls.llama import LLAMA
from server.tool_calls.mistral import MISTRAL, MISTRAL_NAMED
from server.tool_calls.style import Style
from tests import tiny_model

STYLES = {
    **{"hermes": HERMES, "generic": GENERIC, "llama": LLAMA, "mistral": MISTRAL, "mistral named": MISTRAL_NAMED},
    "harmony": HARMONY,
}
MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>")
"""Those of channels, which are tokens that can be seen."""
CONTROLS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer"}},
}
EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary in which some marks are control tokens, and others text."""
    path: Path = tiny_model.write_model(tmp_path_factory.mktemp("calls") / "tiny.gguf")
    with GGUFFile.open(path) as file:
        metadata = dict(file.metadata)
    names, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    metadata["tokenizer.ggml.tokens"] = [*names, *CONTROLS, *MARKS, "<|call|>", "<|return|>"]
    metadata["tokenizer.ggml.token_type"] = np.array([*types, *[3] * (len(CONTROLS) + len(MARKS) + 2)], np.int32)
    return Tokenizer.from_metadata(metadata)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> Tokens:
    return Tokens(tokenizer)


def wanted(style: Style, *, forced: bool, most: int = 2, **more: Any) -> CallGrammar:
    return CallGrammar(
        calls=tuple(
            CallShape(begin=style.begin(name), schema=schema, end=style.close, field=field)
            for name, schema, field in (("get_city", CITY, "tools[0]"), ("get", EMPTY, "tools[1]"))
        ),
        lead="" if forced and style.alone else style.lead,
        first=style.first,
        between=style.between,
        after=style.after,
        most=most if style.parallel else 1,
        text=not forced,
        bare=style.alone and not forced,
        **more,
    )


def compiled(tokens: Tokens, calls: CallGrammar) -> tuple[Grammar | None, Compiled]:
    return _compile(CALLS + msgspec.json.encode(calls), tokens)


def allows(tokenizer: Tokenizer, grammar: Grammar | None, text: str) -> bool:
    """Whether an answer may be a text."""
    assert grammar is not None
    answer = grammar.answer()
    verdict = answer.take(None)
    for token in tokenizer.encode(text, add_special=False, parse_special=True):
        if verdict != MAY_GO_ON or not answer.mask[token // 8] >> (token % 8) & 1:
            return False
        verdict = answer.take(token)
    ends = [token for token in tokenizer.eog_ids if answer.mask[token // 8] >> (token % 8) & 1]
    return verdict == COMPLETE or bool(verdict == MAY_GO_ON and ends)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", STYLES)
def test_a_call_has_its_form_and_its_schema(tokenizer: Tokenizer, tokens: Tokens, name: str, forced: bool) -> None:
    style = STYLES[name]
    grammar, made = compiled(tokens, wanted(style, forced=forced))
    assert made == Compiled()
    good = style.write("get_city", '{"city": "Paris", "days": 5}')
    assert allows(tokenizer, grammar, good)
    assert not allows(tokenizer, grammar, style.write("get_city", '{"town": "Paris"}'))
    assert not allows(tokenizer, grammar, style.write("get", '{"city": "Paris"}'))
    assert not allows(tokenizer, grammar, good + " and text")
    assert allows(tokenizer, grammar, "Text, “free” " + "7" * 40) != forced
    tagged = style.lead + style.first + style.begin("get") + "{}" + style.close + style.after
    assert allows(tokenizer, grammar, "Text before.\n" + tagged) != forced
    unknown = style.write("got", "{}")
    assert allows(tokenizer, grammar, unknown) == (style.alone and not forced)  # a JSON text like any other
    if style.parallel:
        more = style.between + style.begin("get") + "{}" + style.close
        two = good.removesuffix(style.after) + more + style.after
        assert allows(tokenizer, grammar, two)
        assert not allows(tokenizer, grammar, good.removesuffix(style.after) + more * 2 + style.after)


def test_numbers_end_within_calls_alone(tokenizer: Tokenizer, tokens: Tokens) -> None:
    for style in (HERMES, LLAMA):
        grammar, _ = compiled(tokens, wanted(style, forced=False))
        assert not allows(tokenizer, grammar, style.write("get_city", f'{{"city": "", "days": {"7" * 40}}}'))


def test_reasoning_goes_before_a_forced_call(tokenizer: Tokenizer, tokens: Tokens) -> None:
    grammar, made = compiled(tokens, wanted(HERMES, forced=True, thinking="</think>"))
    assert made == Compiled()
    call = HERMES.write("get", "{}")
    assert allows(tokenizer, grammar, f'I think "{"7" * 40}.\n</think>\n\n{call}')
    assert not allows(tokenizer, grammar, call)


def test_an_answer_that_calls_nothing_may_have_a_schema(tokenizer: Tokenizer, tokens: Tokens) -> None:
    grammar, made = compiled(
        tokens, wanted(HERMES, forced=True, answer=AnswerShape(wanted={"type": "array", "items": {"enum": [1, 2]}}))
    )
    assert made == Compiled()
    assert allows(tokenizer, grammar, "[1, 2]")
    assert allows(tokenizer, grammar, HERMES.write("get", "{}"))
    assert not allows(tokenizer, grammar, "[3]")


def test_reasoning_goes_before_an_answer_with_a_schema(tokenizer: Tokenizer, tokens: Tokens) -> None:
    grammar, made = compiled(tokens, CallGrammar(answer=AnswerShape(wanted={"enum": [1, 2]}), thinking="</think>"))
    assert made == Compiled()
    assert allows(tokenizer, grammar, "Hm.</think>\n\n1")
    assert not allows(tokenizer, grammar, "Hm.</think>\n\n3")
    assert not allows(tokenizer, grammar, "1")


def test_marks_that_are_control_tokens_are_text_where_they_are_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode('[TOOL_CALLS]get[ARGS]{"a": 1}<|im_end|>', add_special=False, parse_special=True)
    for shown, text in (((), 'get{"a": 1}'), (MISTRAL_NAMED.markers, '[TOOL_CALLS]get[ARGS]{"a": 1}')):
        detokenizer = Detokenizer(tokenizer, (), with_tokens=False, shown=shown)
        deltas = [*(detokenizer.push(token, None) for token in ids), detokenizer.finish()]
        assert "".join(delta.text for delta in deltas if delta) == text


def test_what_cannot_be_had_is_named(tokens: Tokens) -> None:
    calls = wanted(HERMES, forced=True)
    wrong = CallShape(
        begin=HERMES.begin("x"), schema={"properties": {"a": {"type": "nothing"}}}, end="", field="tools[2]"
    )
    grammar, made = compiled(tokens, _with(calls, wrong))
    assert grammar is None
    assert (made.field, "nothing" in made.error) == ("tools[2]", True)
    odd = CallShape(begin=HERMES.begin("y"), schema={**EMPTY, "dependentRequired": {}, "not": {}}, end=HERMES.close)
    _, made = compiled(tokens, _with(calls, odd))
    assert (made.error, "not" in made.ignored) == ("", True)


def _with(calls: CallGrammar, more: CallShape) -> CallGrammar:
    return CallGrammar(calls=(*calls.calls, more), lead=calls.lead, between=calls.between, most=calls.most)


@pytest.mark.parametrize("name", STYLES)
def test_what_the_grammar_spells_are_the_tokenizers_own_tokens(tokenizer: Tokenizer, tokens: Tokens, name: str) -> None:
    """So a session recognises the call when a client sends it back, however the model would have spelled it."""
    style = STYLES[name]
    grammar, _ = compiled(tokens, wanted(style, forced=True, most=1))
    assert grammar is not None
    draws, answer, ids, token = random.Random(3), grammar.answer(), list[int](), None
    while (verdict := answer.take(token)) == MAY_GO_ON:
        allowed = np.flatnonzero(np.unpackbits(answer.mask, bitorder="little"))
        ends = [int(one) for one in allowed if int(one) in tokenizer.eog_ids]
        quotes = [int(one) for one in allowed if tokens.texts[int(one)] == b'"']
        token = ends[0] if ends else quotes[0] if quotes else int(draws.choice(allowed))
        if token in tokenizer.eog_ids:
            break
        ids.append(token)
    assert verdict in (MAY_GO_ON, COMPLETE)
    text = tokenizer.decode(ids, starts_text=False)
    assert ids == tokenizer.encode(text, add_special=False, parse_special=True)
    start = text.index("{", text.index("get") if not style.open else 0)
    assert json.JSONDecoder().raw_decode(text, start)


def test_an_answer_in_channels_may_think_before_what_it_must_be(tokenizer: Tokenizer, tokens: Tokens) -> None:
    """Forced calls, and answers by a schema, whose marks are tokens of their own."""
    marks = _channel_marks(HARMONY)
    call = HARMONY.write("get_city", '{"city": "Paris"}')
    thought = f"{marks['thinks']}Paris, I think.{marks['thinking']}"
    grammar, made = compiled(tokens, wanted(HARMONY, forced=True, **marks))
    assert made == Compiled()
    assert allows(tokenizer, grammar, call)
    assert allows(tokenizer, grammar, thought + call)
    for other in ("Paris", marks["before"] + "Paris", f"Paris{call}", call + call, HARMONY.write("get_town", "{}")):
        assert not allows(tokenizer, grammar, other)
    grammar, made = compiled(tokens, CallGrammar(answer=AnswerShape(wanted=CITY), **marks))
    assert made == Compiled()
    for before in ("", thought):
        assert allows(tokenizer, grammar, before + marks["before"] + '{"city": "Paris"}')
        assert not allows(tokenizer, grammar, before + marks["before"] + "Paris")
    assert not allows(tokenizer, grammar, '{"city": "Paris"}')
    assert not allows(tokenizer, grammar, call)
    grammar, made = compiled(tokens, CallGrammar(answer=AnswerShape(kind="choice", wanted=["Paris", "Rome"]), **marks))
    assert made == Compiled()
    assert allows(tokenizer, grammar, thought + marks["before"] + "Rome")
    assert not allows(tokenizer, grammar, marks["before"] + "Bern")
    assert not allows(tokenizer, grammar, "Rome")


def test_where_the_form_of_a_channel_leaves_no_choice_its_own_tokens_are_taken(
    tokenizer: Tokenizer, tokens: Tokens
) -> None:
    grammar, _ = compiled(tokens, wanted(HARMONY, forced=True, **_channel_marks(HARMONY)))
    assert grammar is not None
    answer, text, found = grammar.answer(), HARMONY.write("get", "{}"), list[int]()
    answer.take(None)
    for token in tokenizer.encode(text, add_special=False, parse_special=True):
        choices = [one for one in range(tokenizer.vocab_size) if answer.mask[one // 8] >> (one % 8) & 1]
        assert token in choices
        found.append(len(choices))
        verdict = answer.take(token)
    assert found[0] == 1, "the token of a channel"
    assert verdict == COMPLETE
