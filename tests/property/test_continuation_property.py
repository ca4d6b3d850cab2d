"""What a prompt does to a session, against conversations in plain Python.

`Conversation` below is the reference: what was said, turn by turn, and what each way of asking must make of it. The state
machine asks in all ways, in any order, and compares the text the session holds with the text the template would write of
what was said. So nothing that was said is lost, but what was edited or asked for anew.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from atlas_jax.config import PAGE
from atlas_jax.engine.api import ChatFrame
from atlas_jax.engine.sessions.continuation import Continuation, Prompt, appending, continuation
from atlas_jax.engine.sessions.history import History

BOS, START, END, LINE = 0, 1, 2, 3
ROLES = {"system": 4, "user": 5, "assistant": 6}
DEFAULT = (11, 12, 13)
"""The template's own system message."""
GREETINGS = [(20,), (21, 22), (20, 23, 24), tuple(range(30, 60))]

Turn = tuple[str, tuple[int, ...]]
UNSURE: Turn = "system", ()
"""After a system message was taken back: which one came before it is not known, so that any is read again."""


def rendered(turns: Sequence[Turn], *, ask: bool = True, bos: bool = False, default: bool = True) -> list[int]:
    """A conversation as a chat template writes it."""
    out = [BOS] if bos else []
    if default and (not turns or turns[0][0] != "system"):
        turns = [("system", DEFAULT), *turns]
    for role, content in turns:
        out += [START, ROLES[role], LINE, *content, END, LINE]
    return out + ([START, ROLES["assistant"], LINE] if ask else [])


def frame(turns: Sequence[Turn], *, bos: bool = False, default: bool = True) -> ChatFrame:
    system = list(itertools.takewhile(lambda turn: turn[0] == "system", turns))
    return ChatFrame(
        preamble=tuple(rendered(system, ask=False, bos=bos, default=default)),
        own=not system,
        opening=(START, ROLES["assistant"], LINE),
        closing=(END, LINE),
        answers=any(role == "assistant" for role, _ in turns),
    )


class Held:
    """A session as the engine keeps one, with all of its text: it is read in one go, and set back as far as the tail goes.

    Attributes:
      text: every token read.
      decision: what the last prompt did.
    """

    def __init__(self) -> None:
        self.history, self.text, self.pending = History(), [], None
        self.decision = Continuation("new", 0)

    def ask(self, tokens: Sequence[int], reply: Sequence[int], **known: object) -> str:
        """A prompt, and the tokens the model answers, of which the last is not read."""
        prompt = Prompt(np.asarray(tokens, "<i4"), self.pending, **known)  # type: ignore[arg-type]
        before = self.history.copy()
        step = continuation(self.history, prompt)
        assert self.history == before, "deciding changes nothing"
        if step.repeats:
            assert self.text[: step.keep] == list(tokens[: step.keep])
        elif step.keep < self.history.tail_start:
            step = appending(self.history, prompt)
        assert step.skip < len(tokens), "at least one token is left to read"
        assert step.keep <= len(self.text)
        new = [*step.insert, *tokens[step.skip :], *reply[:-1]]
        self.text = self.text[: step.keep] + new
        history = History()
        if step.keep >= before.tail_start:
            history = before.copy()
            history.truncate(step.keep)
        history.extend(self.text[history.length :])
        history.adopt_turns(before, step.keep)
        history.replies += step.answers
        history.preamble = step.preamble
        if reply:
            history.answered(len(self.text) - len(reply) + 1, len(self.text) + 1)
        self.history, self.pending = history, reply[-1] if reply else None
        self.decision = step
        return step.effect


class Conversation(RuleBasedStateMachine):
    """One session, asked by all kinds of clients."""

    @initialize(bos=st.booleans(), default=st.booleans(), system=st.sampled_from([(), (14, 15), tuple(range(60, 100))]))
    def begin(self, bos: bool, default: bool, system: tuple[int, ...]) -> None:
        self.bos, self.default = bos, default
        self.held = Held()
        self.said: list[Turn] = [("system", system)] if system else []
        self.system: Turn | None = None  # the last system message clients have given, as far as the session knows
        self.numbers = itertools.count(1000)
        self.ask(self.said, GREETINGS[0], wanted="new")
        self.system = self.said[0] if system else None

    # --- the ways of asking ----------------------------------------------------------------------------------------
    def ask(
        self,
        known: Sequence[Turn],
        user: tuple[int, ...] | None,
        *,
        wanted: str,
        said: Sequence[Turn] | None = None,
        regenerate: bool = False,
        cut: bool = False,
    ) -> None:
        """A prompt of the turns a client knows and a new one; the session must then hold `said` and the answer."""
        turns = [*known] if user is None else [*known, ("user", user)]
        said = turns if said is None else said
        first = next(self.numbers)
        reply = (first, next(self.numbers), *range(200, 200 + first % 5), *([END] if first % 3 else []))
        how = {"bos": self.bos, "default": self.default}
        effect = self.held.ask(
            rendered(turns, **how),
            reply,
            chat=frame(turns, **how),
            bos=BOS if self.bos else None,
            regenerate=regenerate,
        )
        assert effect == wanted
        kept = next((at for at, (a, b) in enumerate(zip(self.said, said, strict=False)) if a != b), len(said))
        gone = any(role == "system" for role, _ in self.said[kept:])
        known = [turn for turn in said if turn[0] == "system"]
        if gone:
            self.system = UNSURE
        elif len(known) != len([turn for turn in self.said if turn[0] == "system"]):
            self.system = known[-1]
        elif self.system is None and turns[0] == self.first_system:
            self.system = turns[0]
        self.said = [*said, ("assistant", tuple(one for one in reply if one != END))]

    @property
    def turns(self) -> list[int]:
        """Where the user spoke, but for the first time."""
        return [at for at, (role, _) in enumerate(self.said) if role == "user"][1:]

    @rule(user=st.sampled_from(GREETINGS))
    def whole(self, user: tuple[int, ...]) -> None:
        self.ask(self.said, user, wanted="continued")

    @rule(user=st.sampled_from(GREETINGS))
    def only_new(self, user: tuple[int, ...]) -> None:
        self.ask([], user, wanted="appended", said=[*self.said, ("user", user)])

    @rule(user=st.sampled_from(GREETINGS), system=st.sampled_from([(14, 15), (16,), DEFAULT]))
    def only_new_with_a_system_message(self, user: tuple[int, ...], system: tuple[int, ...]) -> None:
        turn = ("system", system)
        new = [] if turn in (self.system, self.first_system) else [turn]
        self.ask([turn], user, wanted="appended", said=[*self.said, *new, ("user", user)])

    @property
    def first_system(self) -> Turn | None:
        """What the template wrote first of itself counts as said, until a client gives another."""
        own = self.default and self.said and self.said[0][0] != "system"
        return ("system", DEFAULT) if self.system is None and own else None

    @rule()
    def first_message_again(self) -> None:
        at = next(at for at, (role, _) in enumerate(self.said) if role == "user")
        if self.said[0][0] != "system" or self.system == self.said[0]:
            self.ask(self.said[: at + 1], None, wanted="appended", said=[*self.said, self.said[at]])

    def kept_system(self, keep: bool) -> list[Turn]:
        return [self.said[0]] if keep and self.said[0][0] == "system" and self.system == self.said[0] else []

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), user=st.sampled_from(GREETINGS), keep=st.booleans())
    def trimmed(self, data: st.DataObject, user: tuple[int, ...], keep: bool) -> None:
        start = data.draw(st.sampled_from(self.turns))
        known = [*self.kept_system(keep), *self.said[start:]]
        self.ask(known, user, wanted="continued", said=[*self.said, ("user", user)])

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), user=st.sampled_from(GREETINGS), number=st.integers(70, 75))
    def trimmed_with_another_system_message(self, data: st.DataObject, user: tuple[int, ...], number: int) -> None:
        start = data.draw(st.sampled_from(self.turns))
        system = ("system", (number,))
        new = [] if system == self.system else [system]
        self.ask([system, *self.said[start:]], user, wanted="continued", said=[*self.said, *new, ("user", user)])

    def later(self, role: str) -> list[int]:
        first = next(at for at, (role, _) in enumerate(self.said) if role == "assistant")
        return [at for at, (other, _) in enumerate(self.said) if other == role and at > first]

    @precondition(lambda self: self.later("user"))
    @rule(data=st.data())
    def edited(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from(self.later("user")))
        self.ask(self.said[:at], (next(self.numbers), 7), wanted="rolled_back")

    @rule(data=st.data(), user=st.sampled_from(GREETINGS))
    def edited_answer_with_all_that_follows(self, data: st.DataObject, user: tuple[int, ...]) -> None:
        at = data.draw(st.sampled_from([at for at, (role, _) in enumerate(self.said) if role == "assistant"]))
        edited = [*self.said[:at], ("assistant", (next(self.numbers), 8)), *self.said[at + 1 :]]
        last = at == len(self.said) - 1 and len(self.said[at][1]) == 0
        self.ask(edited, user, wanted="continued" if last else "rolled_back")

    @precondition(lambda self: len(self.turns) > 1)
    @rule(data=st.data(), keep=st.booleans())
    def edited_and_trimmed(self, data: st.DataObject, keep: bool) -> None:
        start = data.draw(st.sampled_from(self.turns[:-1]))
        at = data.draw(st.sampled_from([at for at in self.turns if at > start]))
        known = [*self.kept_system(keep), *self.said[start:at]]
        user = next(self.numbers), 7
        if self.system_said_after(at) and known[0][0] == "system":
            return
        self.ask(known, user, wanted="rolled_back", said=[*self.said[:at], ("user", user)])

    def system_said_after(self, at: int) -> bool:
        return any(role == "system" for role, _ in self.said[at:])

    @precondition(lambda self: self.turns and self.said[-2][0] == "user")
    @rule()
    def answered_anew(self) -> None:
        self.ask(self.said[:-1], None, wanted="rolled_back")

    @precondition(lambda self: self.said[-2][0] == "user")
    @rule()
    def last_message_answered_anew(self) -> None:
        self.ask([], self.said[-2][1], wanted="rolled_back", said=self.said[:-1], regenerate=True)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "said"):
            text = rendered(self.said[:-1], ask=True, bos=self.bos, default=self.default)
            answer = [*self.said[-1][1], END] if self.held.pending == END else self.said[-1][1]
            assert [*self.held.text, self.held.pending] == [*text, *answer]


def test_a_session_holds_what_was_said_however_clients_ask() -> None:
    run_state_machine_as_test(
        Conversation, settings=settings(max_examples=100, stateful_step_count=25, deadline=None, derandomize=True)
    )


# --- single cases -------------------------------------------------------------------------------------------------
def words(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(100, 50_000, length).tolist())


def talk(*sizes: int) -> tuple[Held, list[Turn]]:
    """A session of turns of these lengths, and what was said in it."""
    held, said = Held(), []
    for number, size in enumerate(sizes):
        said.append(("user", words(number, size)))
        reply = (*words(1000 + number, 40), END)
        held.ask(rendered(said), reply, chat=frame(said))
        said.append(("assistant", reply[:-1]))
    return held, said


def test_a_conversation_longer_than_what_is_known_of_it_word_for_word() -> None:
    sizes = [3_000] * 6
    held, said = talk(*sizes)
    assert held.history.tail_start > 9_000
    before = list(held.text)
    new = ("user", words(50, 20))
    trimmed = [*said[2:], new]  # begins before the tail
    assert held.ask(rendered(trimmed), (7, END), chat=frame(trimmed)) == "continued"
    assert held.text[: len(before)] == before
    assert held.text[len(before) :] == [END, LINE, *rendered([new], default=False), 7]
    held, said = talk(*sizes)
    trimmed = [*said[2:10], new]
    assert held.ask(rendered(trimmed), (7, END), chat=frame(trimmed)) == "rolled_back"
    assert held.text == [*rendered([*said[:10], new]), 7]
    held, said = talk(*sizes)
    edited = [*said[:3], ("assistant", words(60, 40)), *said[4:], new]  # where only digests tell
    assert held.ask(rendered(edited), (7, END), chat=frame(edited)) == "rolled_back"
    assert held.text == [*rendered(edited), 7]


@pytest.mark.parametrize(
    ("prompt", "effect"),
    [
        ((20, 21, 30), "appended"),  # as the session, and then the comma with which the model went on
        ((20, *words(1, 16), 99), "rolled_back"),  # so much of an answer is no chance
        ((20, *words(1, 30), 99), "continued"),
        ((20,), "appended"),
        ((*words(1, 20), 99), "appended"),  # a quotation, of which more follows in the session
        ((*words(1, 30)[8:], 99), "continued"),  # the end of what it holds
    ],
)
def test_plain_completions_show_no_turns(prompt: tuple[int, ...], effect: str) -> None:
    held = Held()
    held.ask([20], [*words(1, 30), END])
    assert held.ask(prompt, [7, END]) == effect


def test_a_session_whose_answers_are_not_known_loses_nothing() -> None:
    held, said = talk(20, 20, 20)
    held.history.replies = []
    sent = [*said[2:], ("user", (20,))]
    before = list(held.text)
    assert held.ask(rendered(sent), (7, END), chat=frame(sent)) == "appended"
    assert held.text[: len(before)] == before


def test_examples_sent_with_every_message_are_no_history() -> None:
    """Neither the first message again, nor another, takes anything back."""
    examples: list[Turn] = [("user", (20,)), ("assistant", words(2, 40)), ("user", (21,)), ("assistant", words(3, 40))]
    held = Held()
    for turn in ((22, 23), (22, 23), (20,), (22, 24)):
        sent = [*examples, ("user", turn)]
        before = list(held.text)
        assert held.ask(rendered(sent), (*words(4, 9), END), chat=frame(sent)) == ("appended" if before else "new")
        assert held.text[: len(before)] == before


def test_what_was_read_and_never_answered_is_not_read_twice() -> None:
    held = Held()
    document = words(5, 300)
    held.ask(document, [])
    assert held.ask(document, [7, END]) == "continued"
    assert held.text == [*document, 7]


@pytest.mark.parametrize("kind", ["words", "periodic"])
def test_long_prompts_do_not_hold_up_others(kind: str) -> None:
    """It is done between the steps of everybody else's answers. Measured: 1.6 ms at most."""
    tokens = np.tile(np.arange(4), 44_000) if kind == "periodic" else np.asarray(words(6, 176_000))
    history = History()
    history.extend(tokens[:150_000].tolist())
    for start in range(1_000, 150_000, 1_000):
        history.answered(start, start + 300)
    known = ChatFrame(preamble=tuple(tokens[:20].tolist()), opening=(7, 8), closing=(5, 6), answers=True)
    edited = tokens.copy()
    edited[149_500] = 3
    trimmed = np.concatenate([tokens[:20], tokens[40_000:]])
    new = np.concatenate([tokens[:20], np.asarray(words(7, 176_000))])
    for prompt in (tokens, edited, trimmed, new):
        for chat in (known, None):
            asked = Prompt(prompt.astype("<i4"), None, None, chat)
            best = min(_seconds(lambda asked=asked: continuation(history, asked)) for _ in range(5))
            assert best < 0.05


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    held=st.integers(1, 3 * PAGE),
    same=st.integers(0, 3 * PAGE),
    new=st.lists(st.integers(0, 3), max_size=40),
    answer=st.integers(0, 3 * PAGE),
    pending=st.none() | st.integers(0, 3),
)
def test_of_a_whole_text_the_session_holds_that_and_nothing_else(
    held: int, same: int, new: list[int], answer: int, pending: int | None
) -> None:
    text = np.random.default_rng(held).integers(0, 3, held).tolist()
    prompt = [*text[:same], *new] or [1]
    history = History()
    history.answered(min(answer, held), held)
    history.extend(text)
    step = continuation(history, Prompt(np.asarray(prompt, "<i4"), pending, whole=True))
    assert step.insert == ()
    assert [*text[: step.keep], *prompt[step.skip :]] == prompt
    assert step.skip < len(prompt), "an answer starts from a token that is read"
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False))))
    assert step.keep == min(shared, len(prompt) - 1), "nothing is read again that need not be"
    assert step.effect == ("continued" if shared == held else "rolled_back")
