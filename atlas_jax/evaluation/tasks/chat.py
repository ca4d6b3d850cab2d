"""Everyday facts of a long message, asked for in a chat."""

from __future__ import annotations

from collections.abc import Sequence

from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.chat_facts import CONVERSATIONS, holds, message
from atlas_jax.evaluation.contexts import Conversation, Question, ask_conversation
from atlas_jax.evaluation.measures import Item, Result, Setup, Task, Value
from atlas_jax.evaluation.tables import Table, cells, share

_TEXTS = ("alice", "twisted_deferred", "psutil_reference")
_ANSWER = 48


def items(setup: Setup) -> list[Item]:
    """Five conversations of six facts, in three texts in turn; a text that is used again begins elsewhere."""
    documents = setup.texts.group("documents")
    sources = [documents[name] for name in _TEXTS if name in documents] or list(documents.values())
    out = []
    for index, facts in enumerate(CONVERSATIONS[: setup.pick(quick=1, standard=len(CONVERSATIONS))]):
        text = message(sources[index % len(sources)], facts, 3 + 10 * (index // len(sources)))
        questions = tuple(Question(fact.question, fact.keys) for fact in facts)
        out.append(Item(f"conversation {index}", 0, Conversation((text,), questions)))
    return out


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """Whether each fact is in the answer to its question, and whether the model ended the answer itself."""
    return ask_conversation(bench, arm, item.data, lambda answer, question: holds(answer, question.wanted), _ANSWER)


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Facts found, and answers that ended."""
    names = {"found": "facts found", "ended": f"answers ended within {_ANSWER} tokens"}
    columns, rows = cells(results, arms, lambda r: [names[r.value.measure]], share)
    about = "Shares of the questions, each asked from the same state by a client that sends the whole conversation."
    return [Table("Everyday facts in a chat", about, columns, rows, form=".2f")]


TASK = Task(
    name="chat",
    part="recall",
    about="Six everyday facts between the paragraphs of a message of 20 000 characters, asked for in the chat; found if the "
    "answer holds the fact's key words.",
    items=items,
    run=run,
    tables=tables,
)
