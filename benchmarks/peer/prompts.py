"""The prompts of the golden continuations: 20 conversations and 50 texts, short and long, of many kinds.

A chat model reads the conversations through its own template and the first 30 texts; a base model reads all the texts.
"""

from __future__ import annotations

Message = dict[str, str]


def _say(*turns: str, system: str = "") -> list[Message]:
    """Alternating turns, the user first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CONVERSATIONS: list[list[Message]] = [
    _say("What is the capital of France?"),
    _say("Give me three tips for sleeping better."),
    _say("Explain in one sentence what a hash table is."),
    _say("Write a haiku about autumn rain."),
    _say("Translate to Spanish: The library closes at nine o'clock."),
    _say("What is 17 + 25?"),
    _say("Write a Python function that checks whether a string is a palindrome."),
    _say("Who wrote Pride and Prejudice, and when was it published?"),
    _say("Summarize: Water boils at lower temperatures at high altitude because the air pressure is lower there."),
    _say("List the planets of the solar system in order, separated by commas."),
    _say("Hi! My name is Clara.", "Hello Clara! How can I help you today?", "What is my name?"),
    _say(
        "I have 12 apples and give away 5.",
        "Then you have 7 apples left.",
        "I buy 10 more. How many apples do I have now?",
    ),
    _say("What should I cook tonight?", system="You are a cheerful Italian chef who answers briefly."),
    _say("Where is the nearest station?", system="Answer every question with a single word."),
    _say("Is it safe to eat raw eggs?", system="You are a careful nutritionist."),
    _say("Turn this into a polite email: I can't come on Monday, let's do Thursday."),
    _say("Quelle est la différence entre un lac et un étang ?"),
    _say("Was ist der größte Fluss in Deutschland?"),
    _say("Classify the sentiment of this review as positive or negative: 'The battery died after two days.'"),
    _say(
        "Read the note and answer. Note: The generator in building C was serviced on 14 March by Ms. Okafor. The "
        "filters were replaced, the coolant was topped up, and a leak near valve 7 was sealed. The next service is "
        "due after 500 hours of running or on 14 September, whichever comes first. The spare keys hang in the office "
        "of the caretaker, Mr. Lindqvist, who can be reached between seven and three. Question: Who keeps the spare "
        "keys?"
    ),
]

_LIGHTHOUSE = (
    "The lighthouse had stood at the end of the long stone pier for more than two hundred years. In winter the "
    "waves broke over the parapet and froze on the iron railings, and the keeper went out with a hammer each "
    "morning to knock the ice away. He had come to the island as a boy, with a tin trunk and a letter for the "
    "harbour master, and he had never left it for longer than a week. He knew the name of every ship that passed,"
    " and most of the captains, and he wrote them down in a ledger with a green cover that he kept beside the "
    "lamp. On the evening of the third of November, a little after the lamp was lit, he saw a light where no "
    "light should have been."
)

_MINUTES = (
    "Minutes of the meeting of 4 May. Present: Adeyemi, Brandt, Costa, Dupont. Apologies: Evans. 1. The minutes "
    "of the last meeting were approved. 2. Costa reported that the roof of the workshop leaks again; the estimate"
    " is 2,300 euros. Agreed to ask for a second estimate. 3. Dupont presented the accounts for the first "
    "quarter: income 14,120, expenses 11,870, balance 2,250. Brandt asked why heating had risen by a third; "
    "Dupont will ask the supplier. 4. The summer festival will be on 21 June. Adeyemi books the band, Brandt the "
    "tents, Costa looks after the permit. 5. Any other business: the coffee machine is broken. Next meeting:"
)

TEXTS: list[str] = [
    "Once upon a time, in a village at the foot of a mountain,",
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    "Q: What is the boiling point of water in degrees Celsius?\nA:",
    "Shopping list:\n- milk\n- bread\n-",
    "The French Revolution began in 1789 because",
    "import numpy as np\n\ndef softmax(x):\n",
    "La capitale de l'Espagne est",
    "To make a cup of tea, first",
    "1, 1, 2, 3, 5, 8, 13,",
    "#include <stdio.h>\n\nint main(void) {\n",
    "Dear Mr. Harrison,\n\nThank you for your letter of 12 March. I am writing to",
    "Photosynthesis is the process by which",
    "SELECT name, COUNT(*) FROM orders",
    "It was a dark and stormy night;",
    "Die Hauptstadt von Österreich ist",
    "January, February, March, April,",
    "The quick brown fox",
    "<!DOCTYPE html>\n<html>\n<head>\n<title>",
    "Albert Einstein was born in",
    "English: cat\nFrench: chat\n\nEnglish: dog\nFrench: chien\n\nEnglish: house\nFrench:",
    "In economics, inflation is defined as",
    "for (let i = 0; i < items.length; i++) {",
    "The main advantages of renewable energy are:\n1.",
    "El perro corre por el parque y",
    _LIGHTHOUSE,
    "## Installation\n\nRun the following command:\n\n```bash\n",
    '{"name": "Alice", "age": 30, "city":',
    _MINUTES,
    " ".join([_LIGHTHOUSE, _MINUTES, _LIGHTHOUSE, _MINUTES, "At the end of the long stone pier"]),
    "A triangle with sides 3, 4 and 5 is",
    "The human heart has four chambers:",
    "Napoleon Bonaparte was defeated at",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "Il mare era calmo e il sole",
    "Monday: rice and beans\nTuesday: vegetable soup\nWednesday:",
    "Abstract. We study the problem of",
    "The recipe serves four. Ingredients: 200 g flour, 3 eggs, 250 ml milk,",
    "O que é a inteligência artificial?",
    "fn main() {\n    let numbers = vec![1, 2, 3];\n",
    "Question: If a train travels 60 miles in 2 hours, what is its average speed?\nAnswer:",
    "The moon orbits the earth, and the earth orbits",
    "東京は日本の",
    "Chapter 1\n\nCall me Ishmael.",
    "Москва — столица",
    "$ ls -la\ntotal 48\ndrwxr-xr-x  5 user user 4096 Jan  3 10:12 .\n",
    "The Great Wall of China was built",
    "北京是中国的",
    "Breaking news: Scientists have discovered",
    "To be, or not to be, that is",
]
