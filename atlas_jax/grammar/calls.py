"""Answers that call tools, as a grammar: text, calls in a model's own form, arguments that follow schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atlas_jax.grammar.shape import AnswerShape


@dataclass(frozen=True, kw_only=True, slots=True)
class CallShape:
    """One tool's calls.

    Attributes:
      begin, end: the texts before and after the arguments.
      schema: of the arguments, a JSON object.
      field: of the request that the schema comes from, for errors.
    """

    begin: str
    schema: Mapping[str, Any]
    end: str
    field: str = "tools"


@dataclass(frozen=True, kw_only=True, slots=True)
class CallGrammar:
    """What an answer that may call tools must match. Names of the model's control tokens in its texts are those tokens.

    Attributes:
      calls: the tools.
      lead: what begins calls; never empty if the answer may be a text.
      first, between, after: what stands before the first call, between two, and after the last.
      most: how many there may be.
      text: whether the answer may be any text, or begin with one; what follows the first `lead` in it are calls.
      bare: whether a text that begins as `first` and a call do is calls too.
      answer: what the answer must match if it calls nothing and `text` is false, or None: it must call.
      before: what stands before `answer`.
      thinking: what ends the reasoning that the answer begins with, or None.
      thinks: what begins that reasoning, where the answer itself does so; it then may have none.
    """

    calls: tuple[CallShape, ...] = ()
    lead: str = ""
    first: str = ""
    between: str = ""
    after: str = ""
    most: int = 1
    text: bool = False
    bare: bool = False
    answer: AnswerShape | None = None
    before: str = ""
    thinking: str | None = None
    thinks: str = ""

    @property
    def opens(self) -> tuple[str, ...]:
        """Texts after the first of which nothing of the answer is free; none if no part of it is."""
        if self.text:
            return (self.lead, *((call.begin for call in self.calls) if self.bare else ()))
        if self.thinking is None:
            return ()
        # where there may be no reasoning, what follows it is as good a sign that it is over
        return (self.thinking, *((one for one in (self.lead, self.before) if one) if self.thinks else ()))


def lark(grammar: CallGrammar, args: list[str], answer: str | None, controls: Mapping[str, int]) -> str:
    """The grammar in llguidance's dialect of Lark.

    Args:
      args: what the arguments of `grammar.calls` are in a rule, in the same order.
      answer: what `grammar.answer` is in a rule.
      controls: the model's control tokens.
    """
    splits = (
        re.compile("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")") if controls else None
    )

    def literal(text: str) -> str:
        parts = [text] if splits is None else splits.split(text)
        return " ".join(
            f"<[{controls[part]}]>" if part in controls else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def up_to(name: str, mark: str) -> str:
        if mark in controls:
            return f"{name}: TEXT {literal(mark)}"
        return f"{name}[lazy]: TEXT {literal(mark)}"

    lines = ["%llguidance {}", "ANY: /(.|\\n)*/"]
    ways = ["TEXT", "lead calls"] if grammar.text else [f"{literal(grammar.lead)} calls"] if grammar.calls else []
    if grammar.text:
        lines.append(up_to("lead", grammar.lead))
    if grammar.bare:
        ways.append("calls")
        heads = "|".join(re.escape(f"{grammar.first}{call.begin}") for call in grammar.calls)
        heads = heads.replace("\\\n", "\\n").replace("/", "\\/")
        lines += [f"HEAD: /({heads})(.|\\n)*/", "TEXT: ANY & ~HEAD"]
    else:
        lines.append("TEXT: ANY")
    if answer is not None:
        ways.append("answer")
        lines.append(f"answer: {literal(grammar.before)} {answer}" if grammar.before else f"answer: {answer}")
    begin = ""
    if grammar.thinking is not None and grammar.thinks:
        begin = "reasoning? "
        lines += [f"reasoning: {literal(grammar.thinks)} thought", up_to("thought", grammar.thinking)]
    elif grammar.thinking is not None:
        begin = "thinking BLANK "
        lines += [up_to("thinking", grammar.thinking), "BLANK: /[ \\n]{0,4}/"]
    lines += [f"start: {begin}body", f"body: {' | '.join(ways)}"]
    if grammar.calls:
        more = f" ({literal(grammar.between)} call){{0,{grammar.most - 1}}}" if grammar.most > 1 else ""
        lines += [
            f"calls: {literal(grammar.first)} call{more} {literal(grammar.after)}",
            f"call: {' | '.join(f'call_{index}' for index in range(len(args)))}",
        ]
    for index, (call, schema) in enumerate(zip(grammar.calls, args, strict=True)):
        lines += [
            f"call_{index}: {literal(call.begin)} args_{index} {literal(call.end)}",
            f"args_{index}: {schema}",
        ]
    return "\n".join(lines) + "\n"
