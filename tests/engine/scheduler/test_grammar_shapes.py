"""Answers held to an expression, a list, GBNF or Lark: what they allow, what is refused, what hostile ones cannot do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import InvalidRequest, Overloaded
from atlas_jax.engine.scheduler.structured_output import Grammars
from atlas_jax.gguf import GGUFFile, Tokenizer
from atlas_jax.grammar.answer import Tokens
from atlas_jax.grammar.calls import CallGrammar
from atlas_jax.grammar.shape import AnswerShape
from atlas_jax.grammar.wire import ANSWER, CALLS, Compiled
from atlas_jax.grammar.worker import Grammar, _compile
from server.tool_calls.hermes import HERMES
from tests import tiny_model
from tests.engine.scheduler.test_grammar_calls import allows, wanted
from tests.patience import PATIENCE

# What GBNF has: comments, groups, classes with ranges and escapes, bounds, rules over several lines, recursion.
NESTED = r"""
# a list of values, which may be lists
root  ::= list "\n"
list  ::= "[" ws (
            value ("," ws value)*   # at least one
          )? "]" ws
value ::= list | text | number-or-null
text  ::= "\"" ( [^"\\\x00-\x1F] | "\\" ["\\nu] )* "\"" ws
number-or-null ::= ("-"? ([0-9] | [1-9] [0-9]{1,4}) | "null") ws
ws ::= [ \t]{0,2}
"""
SUM = 'root ::= (term "=" [0-9]+ "\\n")+\nterm ::= [a-z] | "(" term [-+*/] term ")"\n'
LINES = 'root ::= line+\nline ::= "* " [^\\r\\n\\x85\\u2028]{1,9} "\\n"\n'
LARK = 'start: "yes" | "no" digits\ndigits: /[0-9]{1,30}/\n'
NUMBER = r"-?(0|[1-9][0-9]{0,40})(\.[0-9]+)?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tiny_model.write_model(tmp_path_factory.mktemp("shapes") / "tiny.gguf")
    with GGUFFile.open(path) as file:
        return Tokenizer.from_metadata(file.metadata)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> Tokens:
    return Tokens(tokenizer)


def compiled(tokens: Tokens, kind: Any, wanted: Any) -> tuple[Grammar | None, Compiled]:
    return _compile(ANSWER + msgspec.json.encode(AnswerShape(kind=kind, wanted=wanted, field="f")), tokens)


@pytest.mark.parametrize(
    ("kind", "wanted", "good", "bad"),
    [
        ("choice", ["red", "light blue", 'a "b"\n'], ["red", 'a "b"\n'], ["re", "blue", "redred", ""]),
        ("grammar", NESTED, ['[1, "é\\\\n", [ ]]\n', "[null]\n"], ["[1]", "[01]\n", "[1,]\n", '["a\\x"]\n']),
        ("grammar", SUM, ["((a+b)*c)=12\n", "a=1\nb=2\n"], ["(a+)=1\n", "a=1", "ab=1\n"]),
        ("grammar", LINES, ["* a\n* é b\n"], ["a\n", "* \n", "* a", "* 1234567890\n"]),
        ("grammar", LARK, ["yes", "no" + "7" * 30], ["no", "no" + "7" * 31]),
        ("regex", NUMBER, ["0", "-12.50", "9" * 41], ["01", "", "-", "9" * 42]),
    ],
)
def test_what_a_shape_allows(
    tokenizer: Tokenizer, tokens: Tokens, kind: str, wanted: Any, good: list[str], bad: list[str]
) -> None:
    grammar, made = compiled(tokens, kind, wanted)
    assert made == Compiled()
    assert [text for text in good if not allows(tokenizer, grammar, text)] == []
    assert [text for text in bad if allows(tokenizer, grammar, text)] == []


@pytest.fixture(scope="module")
def dates(tokens: Tokens) -> Grammar | None:
    return compiled(tokens, "regex", r"(a|bc)*[0-9]{2,3}(-[^x]?)?")[0]


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("abc12-xé"), max_size=8))
def test_an_expression_allows_what_pythons_does(tokenizer: Tokenizer, dates: Grammar | None, text: str) -> None:
    matches = re.fullmatch(r"(a|bc)*[0-9]{2,3}(-[^x]?)?", text) is not None
    assert allows(tokenizer, dates, text) == matches


def test_reasoning_and_calls_go_with_any_shape(tokenizer: Tokenizer, tokens: Tokens) -> None:
    for kind, shape, good, bad in (
        ("choice", ["yes", "no"], "yes", "maybe"),
        ("grammar", LARK, "no7", "no"),
        ("grammar", LINES, "* a\n", "a"),
        ("regex", "[ab]+/x", "ab/x", "c/x"),
    ):
        answer = AnswerShape(kind=kind, wanted=shape)  # type: ignore[arg-type]
        thinking = CallGrammar(answer=answer, thinking="</think>")
        grammar, made = _compile(CALLS + msgspec.json.encode(thinking), tokens)
        assert made == Compiled()
        assert allows(tokenizer, grammar, f"Hm.</think>\n\n{good}")
        assert not allows(tokenizer, grammar, f"Hm.</think>\n\n{bad}")
        called = wanted(HERMES, forced=True, answer=answer)
        grammar, made = _compile(CALLS + msgspec.json.encode(called), tokens)
        assert made == Compiled()
        assert allows(tokenizer, grammar, good)
        assert allows(tokenizer, grammar, HERMES.write("get", "{}"))
        assert not allows(tokenizer, grammar, bad)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("regex", "(a"),
        ("regex", "(?=a)b"),
        ("regex", "[^\\s\\S]"),
        ("grammar", "root ::= missing"),
        ("grammar", "nothing ::= 'x'"),
        ("grammar", 'root ::= "a'),
        ("grammar", "start: missing"),
        ("grammar", "start: @other"),
        ("grammar", "root ::= " + "(" * 5000),
        ("grammar", "not a grammar at all"),
        ("grammar", "x: " + '"a" ' * 3),
    ],
)
def test_what_is_no_shape_is_refused_with_a_reason(tokens: Tokens, kind: str, shape: str) -> None:
    grammar, made = compiled(tokens, kind, shape)
    assert grammar is None
    assert 0 < len(made.error) <= 300
    assert not re.search(r"\.(py|rs)\b|Traceback|/", made.error)


HOSTILE: dict[str, tuple[str, Any]] = {
    "repeated repeats": ("regex", "((a{1000}){1000}){1000}"),
    "many states": ("regex", "(.*a.{400}){20}"),
    "a large list": ("choice", [f"{index * 7919 % 1000003:x}" for index in range(20_000)]),
    "empty loops": ("grammar", 'root ::= root | ""\n'),
    "left recursion": ("grammar", "start: start | start start | /a/\n"),
    "doubling": (
        "grammar",
        "\n".join(["root ::= a29", 'a0 ::= "x"', *(f"a{n} ::= a{n - 1} a{n - 1}" for n in range(1, 30))]),
    ),
    "counted repeats": ("grammar", 'root ::= (("a"{1000}){1000}){1000}'),
}
QUICK = ("repeated repeats", "left recursion")


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer)
    yield made
    made.close()


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE if name not in QUICK)]
)
def test_a_hostile_shape_is_compiled_or_refused_by_its_field(grammars: Grammars, name: str) -> None:
    kind, shape = HOSTILE[name]
    hostile = AnswerShape(kind=kind, wanted=shape, field="grammar")  # type: ignore[arg-type]
    error = grammars.answers(hostile).exception(PATIENCE)
    if not isinstance(error, Overloaded):  # on a machine that gives its process no time
        assert error is None or isinstance(error, InvalidRequest)
        assert error is None or (error.param, len(str(error)) < 300) == ("grammar", True)
    fine = AnswerShape(kind="choice", wanted=["yes"], field="f")
    assert grammars.answers(fine).result(PATIENCE).ignored == ()
