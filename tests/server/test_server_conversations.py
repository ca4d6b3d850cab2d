"""The Conversations API through the official client: conversations, their items, responses in them, restarts."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.conversations import Conversation, ConversationItemList
from pydantic import TypeAdapter

from tests.server.fake_engine import FakeEngine
from tests.server.fake_sessions import FakeDocuments
from tests.server.live_server import Live, Start
from tests.server.test_server_responses import prompt_of, session_of

PATH = "/v1/conversations"
GREETING: Any = {"type": "message", "role": "user", "content": "Hello"}
ITEMS: TypeAdapter[Any] = TypeAdapter(ConversationItemList)


def texts(client: openai.OpenAI, conversation: str) -> list[str]:
    found = client.conversations.items.list(conversation, order="asc")
    return [part.text for item in found for part in item.content]  # type: ignore[union-attr]


def test_a_conversation_is_what_the_client_types_and_changes(client: openai.OpenAI, live: Live) -> None:
    before = set(live.engine.documents.kept)
    made = client.conversations.create(items=[GREETING], metadata={"a": "b"})
    Conversation.model_validate(live.http.get(f"{PATH}/{made.id}").json(), strict=True)
    assert (made.id[:5], made.metadata) == ("conv_", {"a": "b"})
    assert client.conversations.retrieve(made.id) == made
    changed = client.conversations.update(made.id, metadata={"c": "d"})
    assert (changed.metadata, changed.created_at) == ({"c": "d"}, made.created_at)
    assert client.conversations.delete(made.id).deleted
    for gone in (client.conversations.retrieve, client.conversations.delete, client.conversations.items.list):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="any", input="x", conversation=made.id)
    assert set(live.engine.documents.kept) == before


def test_responses_read_its_items_and_add_to_them(client: openai.OpenAI, live: Live) -> None:
    talk = client.conversations.create(items=[GREETING]).id
    one = client.responses.create(model="any", input="one", conversation=talk)
    assert session_of(live.engine) == talk
    assert prompt_of(live.engine) == [("user", "Hello"), ("user", "one")]
    added = client.conversations.items.create(talk, items=[{"type": "message", "role": "user", "content": "aside"}])
    assert [item.type for item in added.data] == ["message"]
    two = client.responses.create(model="any", input="two", conversation=talk)
    said = ["Hello", "one", one.output_text, "aside", "two"]
    assert [text for _, text in prompt_of(live.engine)] == said
    assert texts(client, talk) == [*said, two.output_text]
    page = live.http.get(f"{PATH}/{talk}/items", params={"limit": 2}).json()
    ITEMS.validate_python(page, strict=True)
    assert (page["has_more"], page["data"][0]["role"]) == (True, "assistant")
    client.responses.create(model="any", input="lost", conversation=talk, store=False)
    assert texts(client, talk) == [*said, two.output_text]


def test_an_item_is_deleted_with_the_session_that_has_read_it(client: openai.OpenAI, live: Live) -> None:
    talk = client.conversations.create(items=[GREETING]).id
    client.responses.create(model="any", input="secret", conversation=talk)
    items = client.conversations.items.list(talk, order="asc").data
    secret = items[1]
    assert client.conversations.items.retrieve(secret.id, conversation_id=talk) == secret  # type: ignore[arg-type]
    assert ("local", talk) in live.engine.sessions.live
    assert client.conversations.items.delete(secret.id, conversation_id=talk).id == talk  # type: ignore[arg-type]
    assert ("local", talk) not in live.engine.sessions.live
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(secret.id, conversation_id=talk)  # type: ignore[arg-type]
    client.responses.create(model="any", input="next", conversation=talk)
    assert "secret" not in [text for _, text in prompt_of(live.engine)]
    assert len(texts(client, talk)) == 4


def test_conversations_survive_a_restart(start: Start) -> None:
    documents = FakeDocuments()
    before = start(FakeEngine(documents=documents)).openai()
    talk = before.conversations.create(items=[GREETING], metadata={"a": "b"})
    one = before.responses.create(model="any", input="one", conversation=talk.id)
    live = start(FakeEngine(documents=documents))
    after = live.openai()
    assert after.conversations.retrieve(talk.id) == talk
    assert texts(after, talk.id) == ["Hello", "one", one.output_text]
    after.responses.create(model="any", input="two", conversation=talk.id)
    assert len(prompt_of(live.engine)) == 4


def test_a_conversation_that_a_response_has_begun_is_there(client: openai.OpenAI, live: Live) -> None:
    made = client.responses.create(model="any", input="one", conversation="a name")
    assert client.conversations.retrieve("a name").id == "a name"
    assert texts(client, "a name") == ["one", made.output_text]
    aside = client.responses.create(model="any", input="aside", previous_response_id=made.id)
    client.conversations.delete("a name")
    assert ("local", "a name") not in live.engine.sessions.live
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    # what branched off from it goes on
    client.responses.create(model="any", input="more", previous_response_id=aside.id)
    assert [text for _, text in prompt_of(live.engine)][:2] == ["one", made.output_text]
    # and the name begins anew
    client.responses.create(model="any", input="new", conversation="a name")
    assert prompt_of(live.engine) == [("user", "new")]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("", {"items": [{"role": "user"}]}, 400, "items[0].content"),
        ("", {"items": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, 400, "items[0].call_id"),
        ("", {"metadata": {"a": 1}}, 400, "metadata"),
        ("", {"never_heard_of": 1}, 400, "never_heard_of"),
        ("/conv_none", {"metadata": {}}, 404, "conversation_id"),
        ("/conv_none", {}, 400, "metadata"),
        ("/conv_none/items", {"items": [GREETING]}, 404, "conversation_id"),
        ("/conv_none/items", {"items": []}, 400, "items"),
    ],
)
def test_errors_name_the_field(live: Live, path: str, body: Any, status: int, param: str) -> None:
    answer = live.post(PATH + path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
