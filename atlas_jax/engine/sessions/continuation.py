"""What a prompt does to a session: a pure function of what the session holds and what the client has sent.

Some clients send the whole conversation each time, some only its last part, some only what is new. Nothing a session holds
is forgotten unless the client has changed it or asked for it:

=================================================================  ==========================================  ===========
The prompt                                                         What happens                                `history`
=================================================================  ==========================================  ===========
meets an empty session                                             it is read                                  new
begins with all the session holds                                  what follows is read                        continued
repeats it from the beginning, past an answer, then departs or     what the session holds from there on is     rolled_back
ends: a turn was edited, or is to be answered anew                 replaced
repeats a later part of it, with answers, up to its end: old       what follows the repeated part is read;     continued
turns were dropped by the client, not by the session               the dropped turns stay
the same, but departs or ends before its end                       as for a whole conversation                 rolled_back
is only a beginning of it without answers, such as the first       it is new text, said again                  appended
message said once more
the same, or a later message alone, with `atlas.regenerate`        what followed where it was last answered    rolled_back
                                                                   is forgotten
is the whole text, as its sender says (`MemoryParams.whole`)       the session holds it and nothing else       continued,
                                                                                                               rolled_back
anything else: only what is new                                    it follows all the session holds            appended
=================================================================  ==========================================  ===========

New text is read without a beginning-of-text token, without the system message a template inserts of itself, and without one
the session has read last. A system message that is new is read, before the new turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atlas_jax.engine.api import ChatFrame, HistoryEffect
from atlas_jax.engine.sessions.history import History, shared, text_digest

_CERTAIN = 16
"""Tokens of an answer, or of a stretch of text, that nobody repeats by chance. Plain completions show no turns: a prompt
may begin with "Hello" as the session does and go on with the comma with which the model did."""

_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Continuation:
    """How a prompt continues a session.

    Attributes:
      effect: the kind of it.
      keep: tokens of the session's text that stay; less than its length means a rollback.
      insert: tokens that follow them before the prompt's.
      skip: tokens at the prompt's beginning that are not read: the session holds them, or has no use for them.
      repeats: whether the kept tokens are the prompt's own first ones.
      preamble: `History.preamble` once the prompt is read.
      answers: further answers of `History.replies` once it is read: those of an edited conversation.
    """

    effect: HistoryEffect
    keep: int
    insert: tuple[int, ...] = ()
    skip: int = 0
    repeats: bool = False
    preamble: tuple[int, bytes] | None = None
    answers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt and what is known of it.

    Attributes:
      tokens: at least one.
      pending: the session's last token, drawn by the model and not read yet, or None.
      bos: the token with which texts begin, or None.
      chat: None for a plain completion.
      regenerate: whether the client wants it answered anew.
      whole: whether it is known to be the whole text.
    """

    tokens: np.ndarray
    pending: int | None = None
    bos: int | None = None
    chat: ChatFrame | None = None
    regenerate: bool = False
    whole: bool = False

    @property
    def system(self) -> tuple[int, bytes] | None:
        """Where what the client said before its first message ends, and a digest of it."""
        if self.chat is None or self.chat.own or not self.chat.preamble:
            return None
        return len(self.chat.preamble), text_digest(self.chat.preamble)

    @property
    def begins(self) -> int:
        """Where what the client said begins, as far as it is known: after a system message, after a first token."""
        if self.chat is not None and self.chat.preamble is not None:
            return len(self.chat.preamble)
        return int(self.bos is not None and len(self.tokens) > 1 and self.tokens[0] == self.bos)


def continuation(history: History, prompt: Prompt) -> Continuation:
    """Decides what a prompt does to a session; the module says by which rules.

    At least one token of the prompt is always left to read, for an answer starts from a token being read.
    """
    if not history.length:
        return Continuation("new", 0, preamble=prompt.system)
    tokens, count = prompt.tokens, len(prompt.tokens)
    common = history.common_prefix(tokens)
    if prompt.whole:
        keep = min(common, count - 1)
        effect: HistoryEffect = "continued" if common == history.length else "rolled_back"
        return _with_answers(_repeating(effect, keep, history, prompt), prompt)
    answered = _carries_answer(history, prompt, common)
    if common == history.length:
        if count == common and prompt.pending is None:  # read before and not answered yet
            return _repeating("continued", common - 1, history, prompt)
        if count > common and (prompt.pending is None or answered or tokens[common] == prompt.pending):
            return _repeating("continued", common, history, prompt)
    if prompt.regenerate:
        at = _last_answered(history, prompt, common)
        if at is not None:
            return Continuation("rolled_back", at - 1, skip=count - 1, preamble=_preamble_before(history, at))
        answered = answered or common == count
    overlap = _overlap(history, prompt, common) if count > common else None
    if overlap is not None and (not answered or overlap.skip > common):  # a later turn may begin as the first does
        return _with_answers(overlap, prompt)
    if answered:
        return _with_answers(_repeating("rolled_back", min(common, count - 1), history, prompt), prompt)
    return appending(history, prompt, common)


def _with_answers(step: Continuation, prompt: Prompt) -> Continuation:
    """Notes the answers that follow an edit: the client's words by now, but still what its conversation is known by.

    Answers in other prompts are no such thing: they may be examples, sent with every message.
    """
    chat = prompt.chat
    if step.effect != "rolled_back" or chat is None or not chat.opening or not chat.closing:
        return step
    new, moved, answers = prompt.tokens[step.skip :].tobytes(), step.keep + len(step.insert), []
    opening = _find(new, chat.opening)
    while opening is not None:
        start = opening + len(chat.opening)
        closing = _find(new, chat.closing, start)
        if closing is None:
            break
        answers.append((moved + start, moved + closing + 1))
        opening = _find(new, chat.opening, closing)
    return replace(step, answers=tuple(answers))


def _repeating(effect: HistoryEffect, keep: int, history: History, prompt: Prompt) -> Continuation:
    return Continuation(
        effect, keep, skip=keep, repeats=True, preamble=_preamble_before(history, keep) or prompt.system
    )


def appending(history: History, prompt: Prompt, common: int | None = None) -> Continuation:
    """The prompt as new text after all the session holds.

    Args:
      common: how many tokens it begins with in common, where that is known.
    """
    insert: tuple[int, ...] = () if prompt.pending is None else (prompt.pending,)
    if prompt.chat is not None and insert:
        closing = prompt.chat.closing
        insert = closing if closing[:1] == insert else insert + closing
    if common is None:
        common = history.common_prefix(prompt.tokens)
    known, last = _knows_system(history, prompt, common), len(prompt.tokens) - 1
    skip = min(prompt.begins if known else _text_begins(prompt), last)
    preamble = history.preamble
    if prompt.system is not None:
        length, digest = prompt.system
        if not known:
            preamble = history.length + len(insert) + length - skip, digest
        elif preamble is None:
            preamble = prompt.system
    return Continuation("appended", history.length, insert=insert, skip=skip, preamble=preamble)


def _text_begins(prompt: Prompt) -> int:
    return int(prompt.bos is not None and prompt.tokens[0] == prompt.bos)


def _knows_system(history: History, prompt: Prompt, common: int) -> bool:
    """Whether what comes before the prompt's first message need not be read again."""
    if prompt.system is None:
        return True
    if history.preamble is not None:
        return history.preamble[1] == prompt.system[1]
    return common >= prompt.system[0]


def _preamble_before(history: History, position: int) -> tuple[int, bytes] | None:
    """`History.preamble` after a rollback. Which one came before one that is gone is not known: then none counts as known."""
    known = history.preamble
    return (0, b"") if known is not None and known[0] > position else known


def _carries_answer(history: History, prompt: Prompt, common: int) -> bool:
    """Whether a prompt with so many tokens in common goes past the session's first answer, or into it for sure."""
    first = history.first_reply
    if first is None:
        return False
    if prompt.chat is not None:
        return prompt.chat.answers and (common > first or (common == first and len(prompt.tokens) > first))
    wanted = _CERTAIN
    if history.replies and history.replies[0][0] == first:
        wanted = min(wanted, max(1, history.replies[0][1] - first - 1))  # its last token may be one that shows no text
    return common >= first + wanted


def _last_answered(history: History, prompt: Prompt, common: int) -> int | None:
    """Where the last answer to just this prompt begins."""
    if not _knows_system(history, prompt, common):
        return None
    body = prompt.tokens[prompt.begins :]
    if not len(body):
        return None
    tail = np.asarray(history.tail, "<i4")
    for start, _ in reversed(history.replies):
        end = start - history.tail_start
        begin = end - len(body)
        if prompt.system is not None and _preamble_before(history, start) != history.preamble:
            return None  # the client has said now what the session read only later
        if begin >= 0 and tail[end - 1] == body[-1] and np.array_equal(tail[begin:end], body):
            return start
    return None


def _overlap(history: History, prompt: Prompt, common: int) -> Continuation | None:
    """A conversation without its old turns: where its rest lies in what the session holds; None if it does not.

    What comes before the repeated part must be known: it is the session's own beginning, or a system message.
    """
    chat = prompt.chat
    if not history.replies or (chat is not None and not chat.answers):
        return None
    tail = np.asarray(history.tail, "<i4")
    if chat is not None and chat.preamble is not None:
        candidates = [len(chat.preamble)]
    else:  # the first word may have been cut in two, and be other tokens
        candidates = [max(common, prompt.begins), max(common, prompt.begins) + 1]
    for begin in candidates:
        for at, length in _matches(tail, prompt.tokens[begin:]):
            decision = _matched(history, prompt, common, begin, at, length)
            if decision is not None:
                return decision
    first = history.first_reply
    whole = (
        first is not None and common >= first + _CERTAIN
    )  # edited where only digests tell, and not without old turns
    if history.tail_start and not whole:  # what is left may begin before the tail, and then runs through its beginning
        place = _find(prompt.tokens.tobytes(), history.tail[:_CERTAIN])
        if place is not None and prompt.begins < place <= history.tail_start + prompt.begins:
            return _matched(history, prompt, common, place, 0, shared(prompt.tokens[place:], tail))
    return None


def _matched(history: History, prompt: Prompt, common: int, begin: int, at: int, length: int) -> Continuation | None:
    """The decision for a prompt that from `begin` on repeats `length` tokens of the tail from `at` on."""
    start = history.tail_start + at
    end, rest = start + length, begin + length
    count, chat = len(prompt.tokens), prompt.chat
    written = any(max(one, start) < min(max(other, one + 1), end) for one, other in history.replies)
    if chat is not None and chat.preamble is not None:
        # the whole of an answer may have been edited
        written = written or (rest < count and any(start < one == end for one, _ in history.replies))
    elif length < _CERTAIN or (end < history.length and not any(start < one < end for one, _ in history.replies)):
        return None  # an answer alone may be a quotation
    if not written:
        return None
    insert: tuple[int, ...] = ()
    preamble: tuple[int, bytes] | None = None
    if not _knows_system(history, prompt, common):
        assert chat is not None
        assert chat.preamble is not None
        assert prompt.system is not None
        drawn = () if prompt.pending is None or chat.closing[:1] == (prompt.pending,) else (prompt.pending,)
        between = drawn + chat.closing  # what ends the last answer, in the session's text and in the prompt
        if end < history.length or not chat.closing or tuple(prompt.tokens[rest : rest + len(between)]) != between:
            return None
        insert = between + chat.preamble[_text_begins(prompt) :]
        preamble = end + len(insert), prompt.system[1]
        rest += len(between)
        if rest >= count:
            return None
    back = int(rest >= count)
    if not insert:
        preamble = _preamble_before(history, end)
        if prompt.system is not None and preamble != history.preamble:
            return None
    effect: HistoryEffect = "continued" if end - back == history.length else "rolled_back"
    return Continuation(effect, end - back, insert=insert, skip=rest - back, preamble=preamble)


def _matches(text: np.ndarray, pattern: np.ndarray) -> list[tuple[int, int]]:
    """Where `text` repeats the beginning of `pattern`, and how far: up to the text's end, and then at all.

    Of several, the longest repetition, and of equals the last. Common prefixes with every place of the text are found
    together, by bisection over rolling hashes.
    """
    pattern = pattern[: len(text)]
    starts = np.flatnonzero(text == pattern[0]) if len(pattern) else np.empty(0, np.int64)
    if not len(starts):
        return []
    powers = np.cumprod(np.r_[np.uint64(1), np.full(len(text), _BASE)])
    hashes, wanted = _hashes(text, powers), _hashes(pattern, powers)
    low = np.ones(len(starts), np.int64)
    high = np.minimum(len(pattern), len(text) - starts)
    while (low < high).any():
        middle = (low + high + 1) // 2
        same = hashes[starts + middle] - hashes[starts] == wanted[middle] * powers[starts]
        low, high = np.where(same, middle, low), np.where(same, high, middle - 1)
    ending = np.flatnonzero(starts + low == len(text))
    best = [int(ending[0])] if len(ending) else []
    best.append(len(low) - 1 - int(low[::-1].argmax()))
    return [(int(starts[one]), shared(text[starts[one] :], pattern)) for one in best]  # hashes may lie


def _hashes(tokens: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """Of every beginning of a text; that of a stretch is a difference, times the power of where it starts."""
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * powers[: len(tokens)]
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])


def _find(text: bytes, pattern: Sequence[int], start: int = 0) -> int | None:
    """The first place from `start` on where a text, the bytes of an array of tokens, holds a pattern."""
    wanted = np.asarray(pattern, "<i4").tobytes()
    at = text.find(wanted, 4 * start)
    while at >= 0 and at % 4:
        at = text.find(wanted, at + 1)
    return at // 4 if at >= 0 else None
