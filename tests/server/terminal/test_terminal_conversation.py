"""Turns, and what is done to them, as the server gets to see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atlas_jax.engine.api import EngineError, TemplateFacts
from server.terminal.arguments import CommandError
from server.terminal.client import ApiError, Client
from server.terminal.conversation import Conversation, Piece
from server.terminal.fields import RequestFields, assignments
from tests.server.live_server import Live, Start, wait_for

Talk = Callable[..., Conversation]


@pytest.fixture
def talk(live: Live, tmp_path: Path) -> Iterator[Talk]:
    """Conversations with the module's server."""
    clients: list[Client] = []

    def begin(session: str | None = "s", *, fields: RequestFields | None = None, memory: bool = True) -> Conversation:
        clients.append(Client(live.url, place=live.url))
        made = Conversation(
            clients[-1], folder=tmp_path, place=live.url, fields=fields or RequestFields(), memory=memory
        )
        made.open(session)
        return made

    yield begin
    for client in clients:
        client.close()


def say(talk: Conversation, text: str, live: Live, answer: str) -> list[Piece]:
    live.engine.script = [answer]
    return list(talk.say(text))


def sent(live: Live) -> list[tuple[str, str]]:
    """The messages of the last request."""
    return [(one["role"], one["content"]) for one in live.engine.written[0]]


def test_a_session_gets_what_is_new_and_no_more(talk: Talk, live: Live) -> None:
    first = talk(fields=assignments(["temperature=0.25", "seed=7", "blend_ratio=1"]))
    first.system = "Be brief."
    assert "".join(piece.text for piece in say(first, "one", live, "eins")) == "eins"
    say(first, "two", live, "zwei")
    assert sent(live) == [("system", "Be brief."), ("user", "two")]
    request = live.engine.requests[-1]
    assert (request.sampling.temperature, request.sampling.seed) == (0.25, 7)
    assert request.memory.session.session_id == "s"
    assert request.memory.blend_ratio == 1
    assert first.last is not None
    assert first.last.usage["completion_tokens"] == 4
    assert first.last.stats["session_id"] == "s"


def test_it_goes_on_after_a_restart_and_knows_what_was_said(talk: Talk, live: Live) -> None:
    say(talk(), "one", live, "eins")
    again = talk()
    assert [message.content for message in again.transcript.messages] == ["one", "eins"]
    say(again, "two", live, "zwei")
    assert sent(live) == [("user", "two")]


def test_without_a_session_all_of_it_is_sent(talk: Talk, live: Live) -> None:
    plain = talk(None, memory=False)
    say(plain, "one", live, "eins")
    say(plain, "two", live, "zwei")
    assert sent(live) == [("user", "one"), ("assistant", "eins"), ("user", "two")]
    assert live.engine.requests[-1].memory is None


def test_an_undone_turn_is_replaced_by_the_next(talk: Talk, live: Live) -> None:
    one = talk()
    say(one, "one", live, "eins")
    say(one, "two", live, "zwei")
    assert one.undo().content == "two"
    del one
    again = talk()  # also where the terminal was left in between
    say(again, "three", live, "drei")
    assert sent(live) == [("user", "one"), ("assistant", "eins"), ("user", "three")]
    say(again, "four", live, "vier")
    assert sent(live) == [("user", "four")]


def test_undoing_all_of_it_empties_the_session(talk: Talk, live: Live) -> None:
    one = talk()
    say(one, "one", live, "eins")
    one.undo()
    say(one, "two", live, "zwei")
    assert sent(live) == [("user", "two")]
    held = live.engine.sessions.live["local", "s"].tokens
    assert bytes(token for token in held if token < 256) == b"user\ntwozwei"
    with pytest.raises(CommandError, match="nothing to take back"):
        one.undo(), one.undo()


def test_what_others_said_in_a_session_is_not_taken_back(talk: Talk, live: Live) -> None:
    live.post("/v1/completions", {"prompt": "from elsewhere", "atlas": {"session_id": "s"}})
    one = talk()
    with pytest.raises(CommandError, match="were not said at this terminal"):
        one.undo()
    say(one, "one", live, "eins")
    with pytest.raises(CommandError, match="what came before it is not known"):
        one.undo()


def test_an_answer_is_given_anew(talk: Talk, live: Live) -> None:
    one = talk()
    with pytest.raises(CommandError, match="no answer here"):
        one.regenerate()
    say(one, "one", live, "eins")
    live.engine.script = ["uno"]
    assert [piece.text for piece in one.regenerate()] == list("uno")
    assert sent(live) == [("user", "one")]
    assert live.engine.requests[-1].memory.regenerate
    assert [message.content for message in talk().transcript.messages] == ["one", "uno"]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(talk: Talk, live: Live) -> None:
    one = talk()
    live.engine.script, live.engine.delay = ["x" * 4000], 0.005
    cancels = live.engine.cancels
    pieces: Any = one.say("go")
    got = [next(pieces).text for _ in range(3)]
    pieces.close()
    assert one.last is not None
    assert one.last.reason == "cut"
    (_, answer) = one.transcript.messages
    assert (answer.content, answer.cut) == ("".join(got), True)
    wait_for(lambda: live.engine.cancels > cancels and live.engine.running == 0)


def test_a_refusal_leaves_the_conversation_as_it_was(talk: Talk, live: Live) -> None:
    one = talk()
    say(one, "one", live, "eins")
    one.fields.set("atlas.window_size", "100")
    with pytest.raises(ApiError, match=r"atlas\.window_size") as caught:
        list(one.say("two"))
    assert caught.value.status == 400
    assert len(one.transcript.messages) == 2
    assert not one.transcript.rewound


def test_an_answer_that_breaks_is_no_turn(talk: Talk, live: Live) -> None:
    one = talk()
    live.engine.script, live.engine.fail_after = ["some words"], 4
    live.engine.failure = EngineError("The engine broke")
    with pytest.raises(ApiError, match="The engine broke"):
        list(one.say("go"))
    assert one.transcript.messages == []


def test_thoughts_are_told_from_the_answer(talk: Talk, live: Live) -> None:
    live.engine.template = TemplateFacts(thinking=("<think>", "</think>"))
    found = say(talk(), "one", live, "<think>hm</think>eins")
    assert "".join(piece.text for piece in found if piece.kind == "thought") == "hm"
    assert "".join(piece.text for piece in found if piece.kind == "answer") == "eins"


def test_a_branch_goes_on_apart(talk: Talk, live: Live) -> None:
    one = talk()
    say(one, "one", live, "eins")
    one.branch("b")
    say(one, "two", live, "zwei")
    assert live.engine.requests[-1].memory.session.session_id == "b"
    assert [message.content for message in talk("s").transcript.messages] == ["one", "eins"]
    with pytest.raises(ApiError, match="there already") as caught:
        one.branch("s")
    assert caught.value.status == 400
    fresh = talk("unsaid")
    with pytest.raises(ApiError) as caught:
        fresh.branch("c")
    assert caught.value.status == 404


def test_a_save_point_brings_back_memory_words_and_settings(start: Start, tmp_path: Path) -> None:
    live = start()
    with_client = Client(live.url, place="x")
    one = Conversation(with_client, folder=tmp_path, place="x", fields=assignments(["top_k=3"]), memory=True)
    one.open("Ünïcode 名前")
    one.system = "Be kind."
    say(one, "one", live, "eins")
    assert one.save() >= 0
    say(one, "two", live, "zwei")
    one.system = None
    one.fields.set("top_k", "9")
    assert one.load() == 2
    assert [message.content for message in one.transcript.messages] == ["one", "eins"]
    assert (one.system, one.fields.values) == ("Be kind.", {"top_k": 3})
    one.undo()
    with pytest.raises(CommandError, match="taken back"):
        one.save()
    with_client.close()


def test_a_conversation_is_forgotten(talk: Talk, live: Live) -> None:
    one = talk()
    say(one, "one", live, "eins")
    one.clear()
    assert live.engine.sessions.live["local", "s"].tokens == []
    assert talk().transcript.messages == []


def test_a_session_that_is_gone_is_told_what_was_said(talk: Talk, live: Live) -> None:
    say(talk(), "one", live, "eins")
    live.engine.sessions.live.clear()
    again = talk()
    say(again, "two", live, "zwei")
    assert sent(live) == [("user", "one"), ("assistant", "eins"), ("user", "two")]


def test_all_sessions_are_listed_whatever_their_number(talk: Talk, live: Live) -> None:
    from tests.server.fake_sessions import Session

    live.engine.sessions.live.update({("local", f"n{number:05}"): Session() for number in range(2500)})
    assert len(talk().sessions()) == 2500


def test_a_name_that_cannot_be_one_is_refused(talk: Talk) -> None:
    with pytest.raises(CommandError):
        talk("a/b")
    with pytest.raises(CommandError):
        talk(" x")


def test_without_a_memory_it_says_so(start: Start, tmp_path: Path) -> None:
    live = start(atlas={"enabled": False})
    client = Client(live.url, place="x")
    one = Conversation(client, folder=tmp_path, place="x", fields=RequestFields(), memory=True)
    assert one.no_memory == "ATLAS not enabled"
    one.open("s")
    assert one.session is None
    say(one, "one", live, "eins")
    assert live.engine.requests[-1].memory is None
    with pytest.raises(CommandError, match="there is no session: ATLAS not enabled"):
        one.save()
    client.close()


def test_what_cannot_be_reached_is_named(live: Live) -> None:
    client = Client("http://127.0.0.1:1", place="http://127.0.0.1:1")
    with pytest.raises(ApiError, match=r"^http://127\.0\.0\.1:1 cannot be reached: .*refused"):
        client.get("/v1/models")
    client.close()


def test_another_program_is_not_taken_for_a_server() -> None:
    page = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with pytest.raises(ApiError, match="is the address right"):
        Client("http://x", place="x", transport=page).get("/v1/models")
