"""Whatever clients send of a conversation, the session is in the state of one that has read just what was said."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import ChatFrame, MemoryStats
from tests.engine.offline import Answer, ask, ask_all, memory, request, words

START, END, LINE = 301, 302, 303
ROLES = {"system": 304, "user": 305, "assistant": 306}
DEFAULT = tuple(words(1, 11, 300))
"""The template's own system message."""
names = (f"history-{number}" for number in itertools.count())
Turn = tuple[str, tuple[int, ...]]


def user(seed: int, length: int = 20) -> Turn:
    return "user", tuple(words(seed, length, 300))


def rendered(turns: Sequence[Turn], *, ask: bool = True) -> list[int]:
    """A conversation as a chat template writes it."""
    if not turns or turns[0][0] != "system":
        turns = [("system", DEFAULT), *turns]
    out = [token for role, content in turns for token in (START, ROLES[role], LINE, *content, END, LINE)]
    return out + ([START, ROLES["assistant"], LINE] if ask else [])


def frame(turns: Sequence[Turn]) -> ChatFrame:
    system = list(itertools.takewhile(lambda turn: turn[0] == "system", turns))
    return ChatFrame(
        preamble=tuple(rendered(system, ask=False)),
        own=not system,
        opening=(START, ROLES["assistant"], LINE),
        closing=(END, LINE),
        answers=any(role == "assistant" for role, _ in turns),
    )


def stats(answer: Answer) -> MemoryStats:
    assert answer.end.memory is not None
    assert answer.end.memory.tokens_reused == answer.end.cached_tokens
    return answer.end.memory


class Chat:
    """A session, and what was said in it: every answer must be that of a fresh session that is told all of it."""

    def __init__(self, engine: Engine, **how: Any) -> None:
        self.engine, self.name, self.how = engine, next(names), how
        self.said: list[Turn] = []

    def ask(self, *turns: Turn, said: Sequence[Turn] | None = None, regenerate: bool = False) -> MemoryStats:
        """Sends some turns, after which the session must hold `said` (or all that is sent) and the answer."""
        said = turns if said is None else said
        where = memory(self.name, regenerate=regenerate, **self.how)
        answer = ask(self.engine, request(rendered(turns), 12, memory=where, chat=frame(turns)))
        fresh = ask(self.engine, request(rendered(said), 12, memory=memory(next(names), **self.how)))
        assert answer.tokens == fresh.tokens
        np.testing.assert_allclose([i.logprob for i in answer.infos], [i.logprob for i in fresh.infos], atol=5e-2)
        self.said = [*said, ("assistant", tuple(answer.tokens))]
        assert answer.end.prompt_tokens == len(rendered(turns))
        return stats(answer)


@pytest.fixture
def chat(engines: Callable[[str], Engine]) -> Chat:
    return Chat(engines("float32"))


LONG = user(10, 3 * PAGE)


def test_a_greeting_said_again_is_new_text(chat: Chat) -> None:
    hello, fact, question = user(2, 3), user(3, 2 * PAGE), user(4)
    assert chat.ask(hello).history == "new"
    assert chat.ask(fact, said=[*chat.said, fact]).history == "appended"
    again = chat.ask(hello, said=[*chat.said, hello])
    assert again.history == "appended"
    assert again.tokens_reused == 0 or again.tokens_reused < len(rendered([])), "at most the template's own beginning"
    assert chat.ask(question, said=[*chat.said, question]).history == "appended"
    info = chat.engine.sessions.info("owner", chat.name)
    assert info.total_updates > 0


def test_a_whole_conversation_is_read_from_where_it_goes_on(chat: Chat) -> None:
    chat.ask(LONG)
    for turn in range(3):
        known = len(rendered(chat.said[:-1])) + 11
        found = chat.ask(*chat.said, user(20 + turn))
        assert (found.history, found.tokens_reused) == ("continued", known)


def test_dropped_turns_stay_and_only_what_is_new_is_read(chat: Chat) -> None:
    system = "system", tuple(words(5, 30, 300))
    chat.ask(system, LONG)
    for turn in range(3):
        chat.ask(*chat.said, user(30 + turn, 60))
    for kept in ([system], []):
        new = user(40 + len(kept))
        sent = [*kept, *chat.said[-4:], new]
        found = chat.ask(*sent, said=[*chat.said, new])
        assert found.history == "continued"
        assert found.tokens_reused == len(rendered(sent)) - len(rendered([new])) + len(rendered([], ask=False)) - 3
        # all but the new turn, what closes the answer before it, and that answer's last token, which was not read


@pytest.mark.parametrize("edit", [-2, -4])
def test_an_edit_in_a_trimmed_conversation_goes_back_to_it(chat: Chat, edit: int) -> None:
    chat.ask(LONG)
    for turn in range(3):
        chat.ask(*chat.said, user(50 + turn, 60))
    kept, new = chat.said[edit - 2 : edit], user(60)
    found = chat.ask(*kept, new, said=[*chat.said[:edit], new])
    assert found.history == "rolled_back"


def test_an_edit_that_reaches_too_far_back_is_new_text_rather_than_a_loss(engines: Callable[[str], Engine]) -> None:
    """The states before it are gone, and of the text before it only digests are left."""
    engine, name = engines("float32"), next(names)
    said: list[Turn] = []
    for turn in range(6):
        said.append(user(70 + turn, 200 if turn else 66 * PAGE))
        answer = ask(engine, request(rendered(said[-1:]), 12, memory=memory(name), chat=frame(said[-1:])))
        said.append(("assistant", tuple(answer.tokens)))
    held = tokens_of(engine, name)
    near = [*said[6:10], user(80)]
    assert (
        stats(ask(engine, request(rendered(near), 1, memory=memory(name), chat=frame(near)))).history == "rolled_back"
    )
    assert tokens_of(engine, name) < held
    held = tokens_of(engine, name)
    far = [*said[2:4], user(81)]
    found = stats(ask(engine, request(rendered(far), 1, memory=memory(name), chat=frame(far))))
    assert found.history == "appended"
    assert tokens_of(engine, name) == held + 1 + len((END, LINE)) + len(rendered(far)) - found.tokens_reused


def tokens_of(engine: Engine, name: str) -> int:
    """How many tokens a session holds."""
    return next(
        row.tokens for row in engine.sessions.list("owner", after=None, limit=1000)[0] if row.session_id == name
    )


def test_a_last_answer_is_given_anew(chat: Chat) -> None:
    chat.ask(LONG)
    chat.ask(*chat.said, user(90))
    assert chat.ask(*chat.said[:-1]).history == "rolled_back"
    assert chat.ask(chat.said[-2], said=chat.said[:-1], regenerate=True).history == "rolled_back"
    assert chat.ask(*chat.said[:1], regenerate=True).history == "rolled_back", "the beginning, as asked for"
    assert len(chat.said) == 2


def test_a_state_of_text_that_was_edited_away_is_not_gone_on_from(chat: Chat) -> None:
    """Turn 2 is edited, so that the state after it is rolled back; the next edit lies after where that state had ended."""
    chat.ask(LONG)
    chat.ask(*chat.said, user(85, 60))
    chat.ask(*chat.said[:2], user(86, 205))
    assert chat.ask(*chat.said[:-1]).history == "rolled_back"


def test_a_system_message_is_read_when_it_is_new(chat: Chat) -> None:
    first, second = (("system", tuple(words(seed, 25, 300))) for seed in (6, 7))
    chat.ask(first, LONG)
    question = user(100)
    assert chat.ask(first, question, said=[*chat.said, question]).history == "appended"
    assert chat.ask(second, question, said=[*chat.said, second, question]).history == "appended"
    assert chat.ask(second, question, said=[*chat.said, question]).history == "appended"
    trimmed = [*chat.said[-2:], user(101)]
    assert chat.ask(second, *trimmed, said=[*chat.said, user(101)]).history == "continued"
    trimmed = [*chat.said[-2:], user(102)]
    assert chat.ask(first, *trimmed, said=[*chat.said, first, user(102)]).history == "continued"


@pytest.mark.parametrize("way", ["new", "only new", "whole", "trimmed", "anew"])
def test_further_choices_answer_the_same_turn(engines: Callable[[str], Engine], way: str) -> None:
    chat = Chat(engines("float32"))
    new = user(110)
    if way != "new":
        chat.ask(LONG)
        chat.ask(*chat.said, user(111))
    sent = {
        "new": [LONG],
        "only new": [new],
        "whole": [*chat.said, new],
        "trimmed": [*chat.said[2:], new],
        "anew": chat.said[:-1],
    }[way]
    said = [*chat.said, new] if way in ("only new", "trimmed") else sent
    how = memory(chat.name)
    choices = ask_all(
        chat.engine,
        [request(rendered(sent), 12, memory=how, chat=frame(sent), choice=choice) for choice in range(3)],
    )
    fresh = ask(chat.engine, request(rendered(said), 12, memory=memory(next(names))))
    assert [choice.tokens for choice in choices] == [fresh.tokens] * 3
    chat.said = [*said, ("assistant", tuple(fresh.tokens))]
    assert chat.ask(*chat.said, user(112)).history == "continued", "only the first choice stays"


def test_further_choices_answer_a_turn_longer_than_what_is_known_word_for_word(
    engines: Callable[[str], Engine],
) -> None:
    engine, name, sent = engines("float32"), next(names), [user(113, 70 * PAGE)]
    ask(engine, request(rendered([user(114)]), 4, memory=memory(name), chat=frame([])))
    asked = [request(rendered(sent), 4, memory=memory(name), chat=frame(sent), choice=choice) for choice in range(2)]
    first, second = ask_all(engine, asked)
    assert first.infos == second.infos
    assert stats(first).history == stats(second).history == "appended"


def test_a_text_begins_once(engines: Callable[[str], Engine]) -> None:
    """Plain completions bring a beginning-of-text token each; a session keeps its first."""
    engine = engines("begun")
    bos = engine.tokenizer.bos_id
    assert engine.tokenizer.add_bos
    name, first, second = next(names), words(120, 200), words(121, 30)
    answer = ask(engine, request([bos, *first], 6, memory=memory(name)))
    ask(engine, request([bos, *second], 6, memory=memory(name)))
    assert tokens_of(engine, name) == 1 + len(first) + len(answer.tokens) + len(second) + 5
