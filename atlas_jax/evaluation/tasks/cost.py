"""What a memory costs: bytes of a session, and time per token beside a plain window that attends as many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atlas_jax.engine.api import Finished
from atlas_jax.evaluation.arms import FULL, NEAREST, Arm, window_alone
from atlas_jax.evaluation.bench import Bench
from atlas_jax.evaluation.measures import Item, NotPossible, Result, Setup, Task, Value
from atlas_jax.evaluation.statistics import NOTHING, Estimate, median
from atlas_jax.evaluation.tables import Table, cells, only

_PIECE = 4096
_READ, _WRITE = 512, 64
"""Tokens read and written in a round."""


@dataclass(frozen=True)
class Rounds:
    """What is timed.

    Attributes:
      kind: "state", "beside a window" or "along a session".
      lengths: tokens read before.
    """

    kind: str
    text: str
    lengths: tuple[int, ...]
    rounds: int


def items(setup: Setup) -> list[Item]:
    """The state, one comparison in turns, and one session that goes on and on."""
    text = next(iter(setup.texts.group("perplexity").values()))
    beside = 1024 if setup.quick else 4096
    along = (1024, 2048) if setup.quick else (2048, 8192, 32768) + ((131072,) if setup.long else ())
    rounds = setup.pick(quick=3, standard=7)
    return [
        Item("state", 0, Rounds("state", "", (), 1)),
        Item("beside a window", 0, Rounds("beside a window", text, (beside,), rounds)),
        Item("along a session", 0, Rounds("along a session", text, along, rounds)),
    ]


def run(bench: Bench, arm: Arm, item: Item) -> list[Value]:
    """The values of one of the three; raises NotPossible for arms that cost what the text is long."""
    if arm.kind in (FULL, NEAREST):
        raise NotPossible("its bytes and time grow with the text")
    what: Rounds = item.data
    if what.kind == "state":
        pairs = Value("keys and values", arm.attended * bench.token_bytes / 1e6)
        if not arm.options.read:  # a session cannot be without a matrix, but a window alone would need none
            return [pairs]
        resident, snapshot = bench.state_bytes(arm)
        return [pairs, Value("resident", resident / 1e6), Value("snapshot", snapshot / 1e6)]
    bench.engine.warm_up()
    stream = _Stream(bench, what.text)
    return _beside(bench, arm, what, stream) if what.kind == "beside a window" else _along(bench, arm, what, stream)


class _Stream:
    """Tokens of a text again and again, never two pieces that begin the same."""

    def __init__(self, bench: Bench, text: str) -> None:
        self._tokens = bench.tokens(text, begin=False)
        self._at = 0

    def take(self, count: int) -> list[int]:
        self._at = (self._at + 7919) % len(self._tokens)
        whole = self._tokens[self._at :] + self._tokens * (count // len(self._tokens) + 1)
        return whole[:count]


def _beside(bench: Bench, arm: Arm, what: Rounds, stream: _Stream) -> list[Value]:
    """Speeds as ratios to the plain window, in turns; the first round warms up."""
    (length,) = what.lengths
    plain = Arm("plain window", window_alone(window_size=arm.attended))
    out = []
    for number in range(what.rounds + 1):
        prompt = stream.take(length)
        ends = {}
        for one in (arm, plain)[:: 1 if number % 2 else -1]:
            ends[one.name] = bench.answer(prompt, one, _WRITE).end
        if number:
            own, other = ends[arm.name], ends[plain.name]
            out.append(Value("prefill", other.prompt_seconds / own.prompt_seconds, {"tokens": length}))
            out.append(Value("decode", other.decode_seconds / own.decode_seconds, {"tokens": length}))
            out.append(Value("prefill tokens/s", length / own.prompt_seconds, {"tokens": length}))
            out.append(Value("decode tokens/s", (_WRITE - 1) / own.decode_seconds, {"tokens": length}))
    return out


def _along(bench: Bench, arm: Arm, what: Rounds, stream: _Stream) -> list[Value]:
    """Milliseconds per token at each length of one session."""
    out = []
    with bench.session(arm, what.lengths[-1]) as session:
        read = 0

        def go(tokens: int, write: int) -> Finished:
            nonlocal read
            read += tokens + write
            return session.go_on(stream.take(tokens), write).end

        for length in what.lengths:
            while read < length:
                go(min(_PIECE, max(1, length - read)), 1)
            for end in [go(_READ, _WRITE) for _ in range(what.rounds)]:
                labels = {"length": length}
                out.append(Value("ms to read", 1e3 * end.prompt_seconds / _READ, labels))
                out.append(Value("ms to write", 1e3 * end.decode_seconds / (_WRITE - 1), labels))
    return out


def tables(results: Sequence[Result], arms: Sequence[str]) -> list[Table]:
    """Bytes, ratios of speed, and time per token along a session."""
    out = []
    state = [r for r in results if r.value.measure in ("keys and values", "resident", "snapshot")]
    if state:
        columns, rows = cells(state, arms, lambda r: [f"{r.value.measure}, MB"], _median)
        about = (
            "10⁶ bytes: keys and values that are attended in int8, and all that is held of a session that has read five "
            "windows, in memory and in its file. A window alone holds nothing else."
        )
        out.append(Table("State of a session", about, columns, rows, form=".2f"))
    for title, form, measures in (
        ("Speed beside a plain window", ".2f", ("prefill", "decode")),
        ("Tokens per second", ".0f", ("prefill tokens/s", "decode tokens/s")),
    ):
        beside = [r for r in results if r.value.measure in measures]
        if not beside:
            continue
        (length,) = {r.value.labels["tokens"] for r in beside}
        columns, rows = cells(beside, arms, lambda r: [r.value.measure], _median)
        about = (
            f"A prompt of {length} tokens and {_WRITE} more, beside a plain window that attends as many tokens, in turns: "
            "medians over rounds."
        )
        if form == ".2f":
            about += " Speeds as ratios: below 1 is slower, and that of the window to itself shows the noise."
        out.append(Table(title, about, columns, rows, form=form))
    for measure in ("ms to read", "ms to write"):
        part = only(results, measure)
        if part:
            columns, rows = cells(part, arms, lambda r: [str(r.value.labels["length"])], _median)
            about = "Milliseconds per token in one session that has read so many tokens, medians over rounds."
            out.append(Table(f"{measure} a token along a session", about, columns, rows, x="tokens read"))
    return out


def _median(results: Sequence[Result]) -> Estimate:
    return median([result.value.value for result in results]) if results else NOTHING


TASK = Task(
    name="cost",
    part="cost",
    about="Bytes of state of a session, and time per token.",
    items=items,
    run=run,
    tables=tables,
)
