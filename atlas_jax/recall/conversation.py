"""Made-up conversations that ask for what was said long before, and for other things: they fit the gate.

Running text alone knows no questions. Fitted to it, the gate let hardly a fact into an answer; with a constant added in
chats it let facts in, did not end with them, and disturbed answers to questions that had nothing to do with the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_FACTS = (
    ("The password of our guest network is tulip-forty.", "What is the password of our guest network?",
     "The password of your guest network is tulip-forty."),
    ("My shoe size is 43.", "What shoe size do I have?", "Your shoe size is 43."),
    ("Aunt Helga's canary is named Figaro.", "What is Aunt Helga's canary named?", "Aunt Helga's canary is named Figaro."),
    ("The spare key lies under the blue flower pot.", "Where does the spare key lie?",
     "The spare key lies under the blue flower pot."),
    ("We ordered 14 chairs for the party.", "How many chairs did we order for the party?",
     "You ordered 14 chairs for the party."),
    ("My dentist is Doctor Okafor.", "Who is my dentist?", "Your dentist is Doctor Okafor."),
    ("The recipe needs 250 grams of rye flour.", "How much rye flour does the recipe need?",
     "The recipe needs 250 grams of rye flour."),
    ("Lena's new phone number ends with 7719.", "What does Lena's new phone number end with?",
     "Lena's new phone number ends with 7719."),
    ("The band plays at the Old Brewery on Saturday.", "Where does the band play on Saturday?",
     "The band plays at the Old Brewery on Saturday."),
    ("My colleague Tadeo comes from Montevideo.", "Where does my colleague Tadeo come from?",
     "Your colleague Tadeo comes from Montevideo."),
    ("I keep the passports in the green suitcase.", "Where do I keep the passports?",
     "You keep the passports in the green suitcase."),
    ("The rent for the studio is 620 euros.", "How much is the rent for the studio?",
     "The rent for the studio is 620 euros."),
    ("Our guide in Fez was called Younes.", "What was our guide in Fez called?", "Your guide in Fez was called Younes."),
    ("The boiler was repaired in October.", "When was the boiler repaired?", "The boiler was repaired in October."),
    ("My favourite tea is Darjeeling.", "Which tea is my favourite?", "Your favourite tea is Darjeeling."),
    ("The exam has 35 questions.", "How many questions does the exam have?", "The exam has 35 questions."),
    ("Nora drives a yellow Saab.", "What kind of car does Nora drive?", "Nora drives a yellow Saab."),
    ("The library card has the number 50386.", "What is the number of the library card?",
     "The number of the library card is 50386."),
    ("The choir sings Brahms this winter.", "Which composer does the choir sing this winter?",
     "The choir sings Brahms this winter."),
    ("Grandfather worked in a shipyard in Gdansk.", "Where did grandfather work?",
     "Grandfather worked in a shipyard in Gdansk."),
    ("My blood type is AB negative.", "What is my blood type?", "Your blood type is AB negative."),
    ("The marathon starts at the fountain.", "Where does the marathon start?", "The marathon starts at the fountain."),
    ("Ines collects old compasses.", "What does Ines collect?", "Ines collects old compasses."),
    ("The tent weighs 1900 grams.", "How much does the tent weigh?", "The tent weighs 1900 grams."),
)  # fmt: skip
"""What is said, how it is asked for, and the answer."""
_OTHERS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("Can you write a short sentence about the sea?", "The sea is vast and blue, and its waves never stop moving."),
    ("What is two plus three?", "Two plus three is five."),
    ("Why do leaves change their colour?", "Leaves change their colour because the green chlorophyll breaks down."),
    ("Name three kinds of fruit.", "Three kinds of fruit are apples, bananas and oranges."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("How do I boil an egg?", "Put the egg in boiling water for about eight minutes."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("Give me a tip for better sleep.", "Try to go to bed at the same time every night."),
    ("What is a triangle?", "A triangle is a shape with three sides and three angles."),
    ("Which planet is the largest?", "The largest planet in our solar system is Jupiter."),
    ("Translate good morning into Spanish.", "Good morning in Spanish is buenos dias."),
    ("How can I make my kitchen look bigger?", "Use light colours and keep the surfaces clear."),
    ("What does a baker do?", "A baker makes bread, cakes and other baked goods."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What should I wear when it rains?", "You should wear a raincoat and waterproof shoes."),
    ("Why is exercise good for us?", "Exercise makes the heart stronger and lifts our mood."),
    ("Which language is spoken in Brazil?", "Portuguese is the language spoken in Brazil."),
)
PARTS = 2
"""Conversations there are, each with its part of the facts and of the other questions."""

Render = Callable[[Sequence[Mapping[str, str]], bool], list[int]]
"""Makes tokens of messages, and of the beginning of an answer where the second argument is true."""


@dataclass(frozen=True)
class Conversation:
    """A conversation as tokens, and which of them are answers.

    Attributes:
      tokens: the conversation.
      answered: positions after which a token of an answer comes, or the one that ends it.
    """

    tokens: list[int]
    answered: list[int]


def make_conversation(
    filler: str, encode: Callable[[str], list[int]], render: Render, between: int, part: int
) -> Conversation:
    """Facts between the sentences of a long message, and turns that ask for them and for other things.

    Args:
      filler: ordinary prose.
      encode: tokens of a piece of text, without special ones.
      between: tokens of the filler at least.
      part: which of the `PARTS` conversations.

    Raises:
      ValueError: the template writes an answer otherwise than it begins one.
    """
    rng = random.Random(part)
    facts, others = list(_FACTS[part::PARTS]), list(_OTHERS[part::PARTS])
    sentences = [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+", filler) if 20 < len(piece) < 300]
    start = rng.randrange(len(sentences))
    sentences = sentences[start:] + sentences[:start]
    body: list[str] = []
    count = 0
    while count < between and sentences:
        body.append(sentences.pop(0))
        count += len(encode(" " + body[-1]))
    for said, *_ in facts:
        body.insert(rng.randrange(1 + len(body) // 2), said)
    turns = [turn for _, *turn in facts] + [list(turn) for turn in others]
    rng.shuffle(turns)
    messages = [{"role": "user", "content": "Here is something to read.\n\n" + " ".join(body)}]
    turns.insert(0, ["", "Thank you, I have read it."])
    tokens: list[int] = []
    answered: list[int] = []
    for question, answer in turns:
        if question:
            messages.append({"role": "user", "content": question})
        asked = render(messages, True)
        messages.append({"role": "assistant", "content": answer})
        tokens = render(messages, False)
        if tokens[: len(asked)] != asked:
            raise ValueError("the template writes an answer otherwise than it begins one")
        ends = min(len(tokens), len(asked) + len(encode(answer)) + 1)
        if question:  # what is said before there is a memory to read teaches the gate nothing
            answered += range(len(asked) - 1, ends - 1)
    return Conversation(tokens + encode(" ".join(sentences))[:between], answered)
