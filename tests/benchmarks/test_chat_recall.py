"""The benchmark of facts in a chat counts what it says it counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.evaluation.chat_facts import CHARACTERS, CONVERSATIONS, holds, message, words

TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TEENS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip


def spelled(number: int) -> str:
    """A number under a hundred in English words."""
    tens, units = divmod(number, 10)
    if number < 20:
        return TEENS[number]
    return TENS[tens] + (f"-{TEENS[units]}" if units else "")


@settings(deadline=None)
@given(number=st.integers(0, 99), capital=st.booleans())
def test_numbers_in_words_are_their_digits(number: int, capital: bool) -> None:
    said = spelled(number)
    assert words(f"it is {said.capitalize() if capital else said}, I think") == ["it", "is", str(number), "i", "think"]


@pytest.mark.parametrize(
    ("answer", "key", "found"),
    [
        ("Your dog is called BISCUIT!", "Biscuit", True),
        ("Your dog is called Biscuits.", "Biscuit", False),
        ("On March 14th.", "14 & March", True),
        ("It is the fourteenth of March", "14 & March", True),
        ("On March 4th, 2014.", "14 & March", False),
        ("It leaves at seven forty-two.", "7 42", True),
        ("It leaves at 7:42.", "7 42", True),
        ("It leaves at 17:42.", "7 42", False),
        ("Seat 27C", "27C", True),
        ("Row 16, I believe", "16", True),
        ("Row 160", "16", False),
    ],
)
def test_an_answer_counts_if_it_holds_the_whole_key(answer: str, key: str, found: bool) -> None:
    assert holds(answer, (key,)) is found


def test_every_fact_holds_its_own_key_and_no_question_does() -> None:
    facts = [fact for conversation in CONVERSATIONS for fact in conversation]
    assert len(facts) == len({fact.said for fact in facts}) == 30
    for fact in facts:
        assert holds(fact.said, fact.keys), fact
        assert not holds(fact.question, fact.keys), fact


@settings(deadline=None)
@given(
    start=st.integers(0, 500),
    sizes=st.lists(st.integers(1, 1500), max_size=40).map(lambda sizes: [*sizes, *[1000] * 25]),
)
def test_a_message_has_its_length_and_every_fact_early_enough(start: int, sizes: list[int]) -> None:
    text = "\n\n".join(f"p{'x' * size}" for size in sizes)
    made = message(text, CONVERSATIONS[0], start % len(sizes))
    assert len(made) == CHARACTERS
    places = [made.index(f"\n\n{fact.said}\n\n") for fact in CONVERSATIONS[0]]
    assert places == sorted(places)
    assert places[-1] < CHARACTERS - 2000, "the last fact would lie in the window"


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="characters"):
        message("one\n\ntwo", CONVERSATIONS[0], 0)
