"""Everyday facts that people tell in a chat, the text they are told in, and whether an answer holds one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

CHARACTERS = 20_000
FACTS = 6
_BEGIN = "Please read this, I will ask you about it later.\n\n"
_TOLD = 0.8
"""The share of the message over which the facts lie."""
_WORDS = re.compile(r"[a-z0-9]+")
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = {
    "first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12, "twentieth": 20, "thirtieth": 30,
}  # fmt: skip
_NUMBERS = (
    {word: number for number, word in enumerate(_UNITS)}
    | {f"{word}th": number for number, word in enumerate(_UNITS)}
    | {word: 10 * number for number, word in enumerate(_TENS, 2)}
    | _ORDINALS
)


@dataclass(frozen=True)
class Fact:
    """Something a person says, how it is asked for, and what the answer must hold.

    Attributes:
      keys: ways to say it, each a text of which every word must be there, in this order; several keys joined by " & "
        must all be there, anywhere.
    """

    said: str
    question: str
    keys: tuple[str, ...]


CONVERSATIONS: tuple[tuple[Fact, ...], ...] = (
    (
        Fact("By the way, our dog is called Biscuit.", "What is the name of my dog?", ("Biscuit",)),
        Fact("My sister's birthday is on the 14th of March.", "When is my sister's birthday?", ("14 & March",)),
        Fact("On the flight to Oslo I have seat 27C.", "Which seat do I have on the flight to Oslo?", ("27C", "27 C")),
        Fact(
            "The meeting with the architects is in the room Juniper.",
            "In which room is the meeting with the architects?",
            ("Juniper",),
        ),
        Fact("Please remember that I am allergic to walnuts.", "What am I allergic to?", ("walnut", "walnuts")),
        Fact(
            "My train to Leeds leaves at 7:42 on Friday.",
            "At what time does my train to Leeds leave?",
            ("7 42", "07 42"),
        ),
    ),
    (
        Fact("Our new puppy is named Pepper, my son chose it.", "What is our puppy called?", ("Pepper",)),
        Fact("Dad turns seventy on the 9th of November.", "On which day is Dad's birthday?", ("9 & November",)),
        Fact("For the concert we have row 16.", "Which row do we have for the concert?", ("16",)),
        Fact(
            "The interview tomorrow takes place in room 318.", "In which room does the interview take place?", ("318",)
        ),
        Fact("Ben cannot eat sesame, he is allergic to it.", "What is Ben allergic to?", ("sesame",)),
        Fact("The ferry home departs at 18:25.", "When does the ferry home depart?", ("18 25", "6 25")),
    ),
    (
        Fact("Grandma's cat goes by the name of Waffles.", "What is the name of Grandma's cat?", ("Waffles", "Waffle")),
        Fact(
            "We got married on the 23rd of August, so that is our anniversary.",
            "When is our wedding anniversary?",
            ("23 & August",),
        ),
        Fact("I parked the car on level 5.", "On which level did I park the car?", ("5",)),
        Fact(
            "The workshop on Tuesday will be held in the Maple Hall.", "Where is the workshop on Tuesday?", ("Maple",)
        ),
        Fact("Clara is allergic to penicillin.", "Which medicine is Clara allergic to?", ("penicillin",)),
        Fact("My bus to the airport goes at 5:50.", "At what time does my bus to the airport go?", ("5 50", "05 50")),
    ),
    (
        Fact("I call my horse Comet.", "What do I call my horse?", ("Comet",)),
        Fact("Tom's birthday is June 2nd.", "When is Tom's birthday?", ("2 & June",)),
        Fact("My locker at the gym is number 84.", "What is the number of my locker at the gym?", ("84",)),
        Fact("They put us in hotel room 1207.", "What is the number of our hotel room?", ("1207",)),
        Fact("Shellfish makes me ill, I am allergic to it.", "Which food makes me ill?", ("shellfish",)),
        Fact("The plumber comes on Thursday at 10:15.", "When does the plumber come?", ("Thursday", "10 15")),
    ),
    (
        Fact("The parrot in our kitchen is called Sherlock.", "What is our parrot called?", ("Sherlock",)),
        Fact("Maria was born on the 30th of January.", "When was Maria born?", ("30 & January",)),
        Fact("I sit at table 12 at the wedding.", "At which table do I sit at the wedding?", ("12",)),
        Fact(
            "Our team meets in the Copernicus room from now on.", "In which room does our team meet?", ("Copernicus",)
        ),
        Fact("My colleague Priya is allergic to lilies.", "What is Priya allergic to?", ("lilies", "lily")),
        Fact("The last tram runs at 23:38.", "At what time does the last tram run?", ("23 38", "11 38")),
    ),
)


def words(text: str) -> list[str]:
    """The words of a text in small letters, numbers in digits: "Twenty-seven" is 27, "14th" is 14."""
    out: list[str] = []
    tens = False
    for word in _WORDS.findall(text.lower().replace("’", "'")):
        if ordinal := re.fullmatch(r"(\d+)(st|nd|rd|th)", word):
            word = ordinal[1]
        number = _NUMBERS.get(word)
        if number is None:
            out.append(word)
        elif tens and 0 < number < 10:
            out[-1] = str(int(out[-1]) + number)
        else:
            out.append(str(number))
        tens = number is not None and number >= 20 and number % 10 == 0
    return out


def holds(text: str, keys: Sequence[str]) -> bool:
    """Whether a text holds one of the keys, as `Fact.keys` describes them."""
    said = f" {' '.join(words(text))} "
    return any(all(f" {' '.join(words(part))} " in said for part in key.split("&")) for key in keys)


def message(text: str, facts: Sequence[Fact], start: int) -> str:
    """A message of 20 000 characters: the text from its paragraph `start` on, facts after equal shares of it.

    Raises:
      ValueError: the text is too short.
    """
    paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]
    paragraphs = paragraphs[start:] + paragraphs[:start]
    room = CHARACTERS - len(_BEGIN) - sum(len(fact.said) + 2 for fact in facts)
    places = [round(room * _TOLD * (index + 0.5) / len(facts)) for index in range(len(facts))]
    parts, used = list[str](), 0
    waiting = list(zip(places, facts, strict=True))
    for paragraph in paragraphs:
        while waiting and used >= waiting[0][0]:
            parts.append(waiting.pop(0)[1].said)
        parts.append(paragraph)
        used += len(paragraph) + 2
        if used >= room + 2:
            assert not waiting, "a paragraph is longer than what lies between two facts"
            return (_BEGIN + "\n\n".join(parts))[:CHARACTERS]
    raise ValueError(f"a text of {used} characters, {room} are needed")
