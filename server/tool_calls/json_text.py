"""JSON texts recognised character by character, so that an answer's text is told apart as early as it can be."""

from __future__ import annotations

import json
import re
from typing import Literal

Verdict = Literal["more", "done", "wrong"]

MAX_DEPTH = 128
"""Of arrays and objects within each other; Python's own parser gives up at about a thousand."""
_MOST_DIGITS = 1000
_BLANK = " \t\n\r"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_PART = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?((?<=[0-9])[eE][+-]?[0-9]*)?)?")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')


class JsonText:
    """One object or array, as far as it has come.

    Attributes:
      length: characters that belong to it.
    """

    def __init__(self) -> None:
        self.length = 0
        self._nested = ""  # the brackets that are open
        self._expects = "value"
        self._word = ""  # what is left of a literal, what there is of a number
        self._verdict: Verdict = "more"

    def push(self, text: str, at: int = 0) -> Verdict:
        """Goes on by `text` from position `at`; what follows the value's end, or a first wrong character, is not taken."""
        start = at
        while at < len(text) and self._verdict == "more":
            taken = self._take(text, at)
            if taken < 0:
                self._verdict = "wrong"
                break
            at += taken
        self.length += at - start
        return self._verdict

    def _take(self, text: str, at: int) -> int:
        """How many characters were taken; 0 if the same one is to be looked at again, −1 if none can be."""
        char, expects = text[at], self._expects
        if expects in ("string", "key"):
            return self._in_string(text, at)
        if expects.startswith("escape"):
            return self._escaped(char)
        if expects == "number":
            return self._in_number(char)
        if expects == "literal":
            if char != self._word[0]:
                return -1
            self._word = self._word[1:]
            if not self._word:
                self._ended()
            return 1
        if char in _BLANK:
            return 1 if self._nested else -1
        return self._structural(char)

    def _structural(self, char: str) -> int:
        expects, inner = self._expects, self._nested[-1:]
        if expects in ("value", "value or ]") and char not in "]":
            return self._begin(char)
        if (char == "]" and inner == "[" and expects in ("value or ]", "comma")) or (
            char == "}" and inner == "{" and expects in ("key or }", "comma")
        ):
            self._nested = self._nested[:-1]
            self._ended()
        elif char == "," and expects == "comma":
            self._expects = "key only" if inner == "{" else "value"
        elif char == '"' and expects in ("key or }", "key only"):
            self._expects = "key"
        elif char == ":" and expects == "colon":
            self._expects = "value"
        else:
            return -1
        return 1

    def _begin(self, char: str) -> int:
        if char in "{[":
            if len(self._nested) >= MAX_DEPTH:
                return -1
            self._nested += char
            self._expects = "key or }" if char == "{" else "value or ]"
        elif not self._nested:
            return -1
        elif char == '"':
            self._expects = "string"
        elif char in _LITERALS:
            self._expects, self._word = "literal", _LITERALS[char]
        elif char == "-" or char in "0123456789":
            self._expects, self._word = "number", char
        else:
            return -1
        return 1

    def _in_string(self, text: str, at: int) -> int:
        if plain := _PLAIN.match(text, at):
            return plain.end() - at
        if text[at] == '"':
            if self._expects == "key":
                self._expects = "colon"
            else:
                self._ended()
        elif text[at] == "\\":
            self._expects = f"escape in {self._expects}"
        else:
            return -1
        return 1

    def _escaped(self, char: str) -> int:
        within = self._expects.rpartition(" ")[2]
        if self._word:  # digits of \uXXXX that have come
            if char not in "0123456789abcdefABCDEF":
                return -1
            self._word += char
            if len(self._word) == 5:
                self._word, self._expects = "", within
        elif char == "u":
            self._word = "u"
        elif char in '"\\/bfnrt':
            self._expects = within
        else:
            return -1
        return 1

    def _in_number(self, char: str) -> int:
        if len(self._word) > _MOST_DIGITS:
            return -1
        if _NUMBER_PART.fullmatch(self._word + char):
            self._word += char
            return 1
        if not _NUMBER.fullmatch(self._word):
            return -1
        self._ended()
        return 0

    def _ended(self) -> None:
        self._word = ""
        self._expects = "comma"
        if not self._nested:
            self._verdict = "done"


def members(text: str) -> dict[str, str]:
    """The members of a JSON object, each value as it is written; of equal names the last. The text must be JSON."""
    decoder, found, at = json.JSONDecoder(), dict[str, str](), _blank(text, 1)
    while text[at] != "}":
        name, at = decoder.raw_decode(text, at)
        at = _blank(text, _blank(text, at) + 1)
        _, end = decoder.raw_decode(text, at)
        found[name] = text[at:end]
        at = _blank(text, end)
        if text[at] == ",":
            at = _blank(text, at + 1)
    return found


def elements(text: str) -> list[str]:
    """The elements of a JSON array, each as it is written. The text must be JSON."""
    decoder, found, at = json.JSONDecoder(), list[str](), _blank(text, 1)
    while text[at] != "]":
        _, end = decoder.raw_decode(text, at)
        found.append(text[at:end])
        at = _blank(text, end)
        if text[at] == ",":
            at = _blank(text, at + 1)
    return found


def _blank(text: str, at: int) -> int:
    while text[at] in _BLANK:
        at += 1
    return at
