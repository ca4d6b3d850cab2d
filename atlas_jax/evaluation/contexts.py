"""Texts with questions: read once into a session, then each question asked from the same state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.bench import Bench, Session
from atlas_jax.evaluation.measures import Label, Value

_FORCED = "OK"
"""What answers before the questions consist of: a small model goes on saying what it has said, and what it would say is not
the same in every arm."""
_SPARE = 512
"""Tokens of questions, answers and a template beyond those of the texts."""


@dataclass(frozen=True)
class Question:
    """What is asked, and what the answer must be.

    Attributes:
      wrong: answers that count as something of their own, such as a value that has been overwritten.
    """

    text: str
    wanted: tuple[str, ...]
    labels: Mapping[str, Label] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """A text that goes on with each of the questions."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Conversation:
    """What a person says, turn by turn, and asks in the end."""

    turns: tuple[str, ...]
    questions: tuple[Question, ...]


Judge = Callable[[str, Question], bool]


def ask_context(bench: Bench, arm: Arm, context: Context, right: Judge, max_tokens: int) -> list[Value]:
    """Reads a text and asks its questions as text that goes on."""
    prompt = bench.tokens(context.text)
    with bench.session(arm, len(prompt)) as session:
        session.read(prompt)
        out = []
        for question in context.questions:
            answer = session.ask(bench.tokens(question.text, begin=False), max_tokens).text
            out.append(judged(question, answer, right))
        return out


def ask_conversation(bench: Bench, arm: Arm, conversation: Conversation, right: Judge, max_tokens: int) -> list[Value]:
    """Says the turns, each answered with "OK", and asks every question in a message of its own.

    Besides what was found, the values say whether the model ended each answer itself ("ended").
    """
    size = sum(len(bench.tokens(text, begin=False)) + 16 for text in conversation.turns) + _SPARE
    with bench.session(arm, size) as session:
        messages = tell(bench, session, conversation.turns)
        out = []
        for question in conversation.questions:
            asked = [*messages, {"role": "user", "content": question.text}]
            answer = session.say(asked, max_tokens, teach=False)
            out.append(judged(question, answer.text, right))
            out.append(Value("ended", float(answer.ended), question.labels))
        return out


def tell(bench: Bench, session: Session, turns: Sequence[str]) -> list[dict[str, str]]:
    """Says turns that are answered with "OK"; the messages so far."""
    forced = bench.tokens(_FORCED, begin=False)[0]
    messages: list[dict[str, str]] = []
    for text in turns:
        messages.append({"role": "user", "content": text})
        said = session.say(messages, 1, teach=True, forced=forced).text
        messages.append({"role": "assistant", "content": said})
    return messages


def judged(question: Question, answer: str, right: Judge) -> Value:
    """An answer as a value."""
    return Value("found", float(right(answer, question)), question.labels, 1.0, " | ".join(question.wanted), answer)
