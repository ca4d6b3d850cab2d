"""Everyday facts in a long message, asked for in a chat: window alone, memory, everything sent without a memory.

    python -m benchmarks.chat_recall MODEL.gguf --texts TEXT TEXT TEXT [--blends 0.1 0.5 0.9] [--draws 3] [--output FILE.md]

A conversation begins with a message of 20 000 characters of a real text, between whose paragraphs six things lie that
people tell: the name of a dog, a birthday, a seat. The last of them ends more than 4 000 characters before the message
does, so that all have left a window of 512 tokens. The model answers "OK", made to with `logit_bias`: a small model goes on
saying what it has said, and what it would say is not the same in every arm. Then each thing is asked for in a message of
its own, by a client that sends the whole conversation, as most do. Every question of a conversation is asked from the same
state (`write: false`), greedily and several times with the sampling of requests that name none.

A fact is found if the answer holds its key, whole words, whatever the case and punctuation; numbers may be written as
words ("seven forty-two" for 7:42, "the fourteenth of March"). An answer that also says something else counts too: the
window alone shows what can be had by guessing.

All arms ask one server, with its defaults but for what an arm names: the window alone is a session whose memory is not
read (`blend_ratio` 0), "everything sent" a plain request, which attends all there is.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_jax.gguf import GGUFFile, Tokenizer
from benchmarks.server_process import Server

CHARACTERS = 20_000
FACTS = 6
_ANSWER_TOKENS = 48
_NOTES = "## Notes\n"
_MEANINGS = {0.1: ", the gate as fitted on running text", 0.5: ", the default"}
_BEGIN = "Please read this, I will ask you about it later.\n\n"
_FIRST_ANSWER = "OK"
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


@dataclass(frozen=True)
class Arm:
    """One way to ask; `atlas` is the request's object but for the session, None a plain request."""

    name: str
    atlas: dict[str, Any] | None


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    conversation: int
    fact: Fact
    greedy: bool
    text: str

    @property
    def found(self) -> bool:
        """Whether it holds the fact's key."""
        return holds(self.text, self.fact.keys)


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


def wilson(found: float, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson); `found` need not be whole where a fact was asked for several times."""
    z2, share = 1.96**2, found / asked
    middle = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = (z2 * (share * (1 - share) / asked + z2 / (4 * asked**2))) ** 0.5 / (1 + z2 / asked)
    return max(0.0, middle - half), min(1.0, middle + half)


def chat(server: Server, messages: list[dict[str, str]], tokens: int, **fields: object) -> dict[str, Any]:
    """A chat completion."""
    answer = server.http.post(
        "/v1/chat/completions", json={"messages": messages, "max_completion_tokens": tokens, **fields}
    )
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def ask(server: Server, arm: Arm, texts: Sequence[str], ok: int, draws: int) -> list[Answer]:
    """All facts of all conversations, each asked for greedily and `draws` times with the server's own sampling.

    Args:
      ok: the token that the first answer consists of.
    """
    out: list[Answer] = []
    for index, (text, facts) in enumerate(zip(texts, CONVERSATIONS, strict=True)):
        atlas = None if arm.atlas is None else arm.atlas | {"session_id": f"{arm.name} {index}"}
        common: dict[str, Any] = {} if atlas is None else {"atlas": atlas}
        begun = [{"role": "user", "content": text}]
        first = chat(server, begun, 1, temperature=0, logit_bias={str(ok): 100}, **common)
        said = first["choices"][0]["message"]["content"]
        assert said == _FIRST_ANSWER, said
        begun.append({"role": "assistant", "content": said})
        if atlas is not None:
            common = {"atlas": atlas | {"write": False}}
        for fact in facts:
            messages = [*begun, {"role": "user", "content": fact.question}]
            for sampling in ({"temperature": 0}, {"seed": 1, "n": draws}):
                body = chat(server, messages, _ANSWER_TOKENS, **sampling, **common)
                if atlas is not None:  # each question finds the session as the first answer left it
                    assert body["atlas_stats"]["history"] == "continued", body["atlas_stats"]
                out += [
                    Answer(index, fact, "temperature" in sampling, choice["message"]["content"])
                    for choice in body["choices"]
                ]
    return out


def table(answers: dict[str, list[Answer]], draws: int) -> str:
    """Facts found by arm, with intervals; several draws of a fact count as one question."""
    facts = sum(map(len, CONVERSATIONS))
    lines = [
        f"| facts found of {facts} (95 % interval of the share) | greedy | default sampling, mean of {draws} draws |",
        "|---|---|---|",
    ]
    for name, given in answers.items():
        greedy = sum(one.found for one in given if one.greedy)
        drawn = sum(one.found for one in given if not one.greedy) / draws
        cells = []
        for figure, found in ((f"{greedy}", greedy), (f"{drawn:.1f}", drawn)):
            low, high = wilson(found, facts)
            cells.append(f"{figure} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def examples(answers: dict[str, list[Answer]]) -> str:
    """What every arm said greedily."""
    names = list(answers)
    lines = [f"| question | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    rows = zip(*([one for one in answers[name] if one.greedy] for name in names), strict=True)
    for row in rows:
        assert len({one.fact.question for one in row}) == 1, "the arms were asked different questions"
        cells = [f"{'**' if one.found else ''}{_cell(one.text)}{'**' if one.found else ''}" for one in row]
        lines.append(f"| {_cell(row[0].fact.said)} {_cell(row[0].fact.question)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("*", "")
    return line if len(line) <= 90 else f"{line[:87]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="texts the facts lie in, in turn")
    parser.add_argument("--blends", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--draws", type=int, default=3, help="how often each question is asked at default sampling")
    parser.add_argument("--adapter", type=Path, help="another memory than the shipped one")
    parser.add_argument("--output", type=Path, help="Markdown file for the result; its notes stay")
    parser.add_argument("--answers", type=Path, help="JSON file for all answers")
    args = parser.parse_args()
    with GGUFFile.open(args.model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    (ok,) = tokenizer.encode(_FIRST_ANSWER, add_special=False, parse_special=False)
    sources = [path.read_text("utf-8") for path in args.texts]
    # a text that is used again begins elsewhere
    texts = [
        message(sources[index % len(sources)], facts, 3 + 10 * (index // len(sources)))
        for index, facts in enumerate(CONVERSATIONS)
    ]
    arms = [Arm("window alone", {"blend_ratio": 0.0})]
    arms += [Arm(f"memory, blend {blend:g}{_MEANINGS.get(blend, '')}", {"blend_ratio": blend}) for blend in args.blends]
    arms.append(Arm("everything sent, no memory", None))
    answers: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as name:
        flags = () if args.adapter is None else ("--atlas-adapter", str(args.adapter))
        server = Server(args.model, Path(name), flags)
        try:
            for arm in arms:
                answers[arm.name] = ask(server, arm, texts, ok, args.draws)
                found = sum(one.found for one in answers[arm.name])
                print(f"{arm.name}: {found} of {len(answers[arm.name])} answers", flush=True)
        finally:
            server.end()
    if args.answers is not None:
        rows = [
            {"arm": arm, "said": one.fact.said, "greedy": one.greedy, "found": one.found, "answer": one.text}
            for arm, given in answers.items()
            for one in given
        ]
        args.answers.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    report = (
        f"{table(answers, args.draws)}\n\nGreedy answers, those that hold the fact in bold:\n\n{examples(answers)}\n"
    )
    print(report)
    if args.output is not None:
        command = f"python -m benchmarks.chat_recall {args.model} --texts {' '.join(path.name for path in args.texts)}"
        document = f"# Everyday facts in a chat\n\n`{command}` (`make chat-recall`):\n\n{report}"
        args.output.write_text(document + _notes(args.output))


def _notes(output: Path) -> str:
    """What people have written under the tables of an earlier run."""
    _, found, notes = output.read_text().partition(_NOTES) if output.exists() else ("", "", "")
    return f"\n{found}{notes}" if found else ""


if __name__ == "__main__":
    main()
