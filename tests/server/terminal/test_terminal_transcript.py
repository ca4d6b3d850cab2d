"""What was said is the same when it is read again, whatever was done to it and wherever the file was cut off."""

from __future__ import annotations

import stat
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.terminal.arguments import CommandError
from server.terminal.transcript import Message, Transcript, saved_state, transcript_path

_DONE = st.one_of(
    st.tuples(st.just("add"), st.text(max_size=9), st.text(max_size=9), st.booleans()),
    st.tuples(st.sampled_from(["undo", "rewind", "told", "restart", "join"])),
)


def do(transcript: Transcript, what: tuple[object, ...]) -> None:
    match what:
        case ("add", question, answer, cut):
            transcript.add(str(question), str(answer), cut=bool(cut))
        case ("restart",):
            transcript.restart([Message("user", "a"), Message("assistant", "b")])
        case ("join",):
            transcript.restart([], joined=True)
        case (name,):
            getattr(transcript, str(name))()


def facts(transcript: Transcript) -> tuple[object, ...]:
    return transcript.messages, transcript.rewound, transcript.joined


@settings(max_examples=30, deadline=None)
@given(st.lists(_DONE, max_size=12), st.integers(0, 40))
def test_it_is_read_as_it_was_written(done: list[tuple[object, ...]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a" / "t.jsonl"
        written = Transcript(path)
        before = facts(Transcript())
        for one in done:
            before = facts(written) if path.exists() else before
            do(written, one)
        assert facts(Transcript.open(path)) == facts(written)
        if not path.exists():
            return
        data = path.read_bytes()
        last = data[data[:-1].rfind(b"\n") + 1 :]
        if 0 < cut < len(last) - 1:  # the last line was cut off: it is as if it had not been written
            path.write_bytes(data[:-cut])
            again = Transcript.open(path)
            again.add("new", "line")
            assert Transcript.open(path).messages[-2:] == [Message("user", "new"), Message("assistant", "line")]


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    path = transcript_path(tmp_path, "http://x", "../../etc/passwd")
    Transcript(path).add("hello", "you")
    assert path.parent == tmp_path / "transcripts"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert transcript_path(tmp_path, "http://y", "../../etc/passwd") != path


def test_thirty_thousand_turns_are_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    Transcript(path).add("how long?", "very")
    path.write_bytes(path.read_bytes() * 30_000)
    started = time.process_time()
    found = Transcript.open(path)
    assert len(found.messages) == 60_000
    assert time.process_time() - started < 5
    assert found.tail(32)[0]["role"] == "user"
    assert len(found.tail(33)) == 32


def test_a_save_point_keeps_the_last_messages_that_fit() -> None:
    transcript = Transcript()
    for number in range(100):
        transcript.add(f"question {number}", "x" * 900)
    state = saved_state(transcript, None, {}, 20_000)
    kept = state["messages"]
    assert 30 < len(kept) < 44  # of 900 characters and some each
    assert kept[0]["role"] == "user"
    assert kept[-1] == {"role": "assistant", "content": "x" * 900}
    assert state["joined"]
    assert not saved_state(transcript, None, {}, 1 << 20)["joined"]


def test_a_branch_has_a_transcript_of_its_own(tmp_path: Path) -> None:
    first = Transcript(tmp_path / "a")
    first.add("one", "1")
    second = first.copied(tmp_path / "b")
    second.add("two", "2")
    assert [message.content for message in Transcript.open(tmp_path / "a").messages] == ["one", "1"]
    assert [message.content for message in Transcript.open(tmp_path / "b").messages] == ["one", "1", "two", "2"]


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    transcript = Transcript(tmp_path / "file" / "t.jsonl")
    with pytest.raises(CommandError, match="cannot be kept"):
        transcript.add("one", "1")
    assert len(transcript.messages) == 2
    (tmp_path / "folder").mkdir()
    with pytest.raises(CommandError, match="cannot be read"):
        Transcript.open(tmp_path / "folder")
