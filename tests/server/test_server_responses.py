"""The Responses API through the official client: events as it types them, chains, branches, conversations, what is kept."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from atlas_jax.engine.api import StorageFull
from tests.patience import PATIENCE
from tests.server.fake_engine import END, START, FakeEngine
from tests.server.fake_sessions import FakeDocuments
from tests.server.live_server import Live, Start, wait_for

PATH = "/v1/responses"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
QUESTION = "How are you?"


def prompt_of(engine: FakeEngine, at: int = -1) -> list[tuple[str, str]]:
    """The messages of a prompt: role and text."""
    tokens, out = list(engine.requests[at].prompt), []
    while tokens:
        assert tokens[0] == START
        end = tokens.index(END)
        role, _, text = bytes(tokens[1:end]).decode().partition("\n")
        out.append((role, text))
        tokens = tokens[end + 1 :]
    return out


def events(live: Live, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    text = live.post(PATH, {**body, "stream": True}).text
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def session_of(engine: FakeEngine, at: int = -1) -> str | None:
    memory = engine.requests[at].memory
    return None if memory is None or memory.session is None else memory.session.session_id


def test_a_response_is_what_the_client_types_and_is_kept(client: openai.OpenAI, live: Live) -> None:
    made = client.responses.create(
        model="any", input=QUESTION, instructions="Be brief", metadata={"a": "b"}, temperature=0.25, user="u"
    )
    assert prompt_of(live.engine) == [("system", "Be brief"), ("user", QUESTION)]
    assert live.engine.requests[-1].sampling.temperature == 0.25
    assert made.status == "completed"
    assert made.output_text.startswith("system\nBe brief")
    assert (made.instructions, made.metadata, made.temperature, made.store) == ("Be brief", {"a": "b"}, 0.25, True)
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert made.usage.input_tokens == len(live.engine.requests[-1].prompt)
    again = client.responses.retrieve(made.id)
    assert again == made
    raw = live.http.get(f"{PATH}/{made.id}").json()
    Response.model_validate(raw, strict=True)
    (item,) = client.responses.input_items.list(made.id)
    assert item.content[0].text == QUESTION  # type: ignore[union-attr]


@pytest.mark.parametrize("limit", [None, 3])
def test_every_event_of_a_stream_is_as_the_client_types_it(live: Live, limit: int | None) -> None:
    found = list(
        events(live, {"input": QUESTION, "max_output_tokens": limit, "include": ["message.output_text.logprobs"]})
    )
    parsed = [EVENTS.validate_python(data, strict=True) for _, data in found]
    assert [name for name, _ in found] == [event.type for event in parsed]
    assert [event.sequence_number for event in parsed] == [*range(len(parsed))]
    kinds = [event.type for event in parsed if event.type != "response.output_text.delta"]
    last = "response.completed" if limit is None else "response.incomplete"
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        last,
    ]
    response = parsed[-1].response
    text = "".join(event.delta for event in parsed if event.type == "response.output_text.delta")
    assert text == response.output_text == f"user\n{QUESTION}"[:limit]
    assert response.incomplete_details is None or response.incomplete_details.reason == "max_output_tokens"
    (item,) = response.output
    assert [one.token for one in item.content[0].logprobs] == list(text)
    assert live.http.get(f"{PATH}/{response.id}").json() == json.loads(json.dumps(found[-1][1]["response"]))


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    with client.responses.stream(model="any", input=QUESTION) as stream:
        *_, final = stream
        assert final.type == "response.completed"
        assert stream.get_final_response().output_text == f"user\n{QUESTION}"


def test_a_chain_brings_the_whole_conversation_to_one_session(client: openai.OpenAI, live: Live) -> None:
    one = client.responses.create(model="any", input="one", instructions="old")
    assert session_of(live.engine) is None
    two = client.responses.create(model="any", input="two", previous_response_id=one.id, instructions="new")
    expected = [("system", "new"), ("user", "one"), ("assistant", one.output_text), ("user", "two")]
    assert prompt_of(live.engine) == expected
    three = client.responses.create(
        model="any", input=[{"role": "user", "content": "three"}], previous_response_id=two.id
    )
    assert prompt_of(live.engine)[1:-1] == [*expected[2:], ("assistant", two.output_text)]
    assert session_of(live.engine, 1) == session_of(live.engine, 2) == one.id
    assert [request.memory.whole for request in live.engine.requests[1:]] == [True, True]
    assert three.previous_response_id == two.id
    assert live.engine.sessions.forks == []


def test_a_second_answer_to_the_same_response_branches(client: openai.OpenAI, live: Live) -> None:
    root = client.responses.create(model="any", input="root")
    left = client.responses.create(model="any", input="left", previous_response_id=root.id)
    right = client.responses.create(model="any", input="right", previous_response_id=root.id)
    assert live.engine.sessions.forks == [("local", root.id, right.id)]
    assert session_of(live.engine) == right.id
    client.responses.create(model="any", input="more left", previous_response_id=left.id)
    assert session_of(live.engine) == root.id
    assert [text for _, text in prompt_of(live.engine)] == [
        "root",
        root.output_text,
        "left",
        left.output_text,
        "more left",
    ]
    client.responses.create(model="any", input="more right", previous_response_id=right.id)
    assert session_of(live.engine) == right.id
    assert [text for _, text in prompt_of(live.engine)][2:] == ["right", right.output_text, "more right"]


def test_two_at_once_after_one_response_do_not_share_a_session(live: Live, client: openai.OpenAI) -> None:
    root = client.responses.create(model="any", input="root " + "x" * 200)
    live.engine.delay = 0.02
    bodies = [{"input": name, "previous_response_id": root.id} for name in ("a", "b")]
    threads = [threading.Thread(target=live.post, args=(PATH, body)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live.engine.delay = 0.0
    assert len({session_of(live.engine, at) for at in (-1, -2)}) == 2


def test_a_conversation_goes_on_from_its_last_response_and_one_waits_for_the_other(
    live: Live, client: openai.OpenAI
) -> None:
    first = client.responses.create(model="any", input="first", conversation="talk é")
    assert first.conversation is not None
    assert first.conversation.id == session_of(live.engine) == "talk é"
    live.engine.delay = 0.01
    threads = [
        threading.Thread(target=live.post, args=(PATH, {"input": name, "conversation": {"id": "talk é"}}))
        for name in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live.engine.delay = 0.0
    second, third = prompt_of(live.engine, 1), prompt_of(live.engine, 2)
    assert second[:2] == [("user", "first"), ("assistant", first.output_text)]
    assert third[: len(second)] == second
    assert len(third) == len(second) + 2


def test_what_follows_a_response_of_a_conversation_is_no_part_of_it(client: openai.OpenAI, live: Live) -> None:
    first = client.responses.create(model="any", input="first", conversation="talk")
    aside = client.responses.create(model="any", input="aside", previous_response_id=first.id)
    assert (session_of(live.engine), aside.conversation) == (aside.id, None)
    assert live.engine.sessions.forks == [("local", "talk", aside.id)]
    client.responses.create(model="any", input="second", conversation="talk")
    assert [text for _, text in prompt_of(live.engine)] == ["first", first.output_text, "second"]


def test_what_is_not_stored_leaves_no_trace(client: openai.OpenAI, live: Live) -> None:
    root = client.responses.create(model="any", input="root")
    for previous in (None, root.id):
        made = client.responses.create(model="any", input="x", store=False, previous_response_id=previous)
        assert made.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)
    memory = live.engine.requests[-1].memory
    assert memory is not None
    assert (memory.write, memory.session.session_id) == (False, root.id)
    client.responses.create(model="any", input="next", previous_response_id=root.id)
    assert session_of(live.engine) == root.id


def test_it_survives_a_restart(start: Start) -> None:
    documents = FakeDocuments()
    before = start(FakeEngine(documents=documents)).openai()
    root = before.responses.create(model="any", input="root")
    child = before.responses.create(model="any", input="child", previous_response_id=root.id)
    live = start(FakeEngine(documents=documents))
    after = live.openai()
    assert after.responses.retrieve(root.id) == root
    after.responses.create(model="any", input="branch", previous_response_id=root.id)
    assert [text for _, text in prompt_of(live.engine)] == ["root", root.output_text, "branch"]
    assert len(live.engine.sessions.forks) == 1
    after.responses.create(model="any", input="on", previous_response_id=child.id)
    assert session_of(live.engine) == root.id


def test_deleting_takes_the_session_with_the_last_and_keeps_what_others_build_on(
    client: openai.OpenAI, live: Live
) -> None:
    root = client.responses.create(model="any", input="root")
    child = client.responses.create(model="any", input="child", previous_response_id=root.id)
    assert ("local", root.id) in live.engine.sessions.live
    assert live.http.delete(f"{PATH}/{root.id}").json() == {"id": root.id, "object": "response", "deleted": True}
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            gone(root.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="any", input="x", previous_response_id=root.id)
    client.responses.create(model="any", input="on", previous_response_id=child.id, store=False)
    assert prompt_of(live.engine)[0] == ("user", "root")
    client.responses.delete(child.id)
    assert ("local", root.id) not in live.engine.sessions.live
    assert not [name for _, name in live.engine.documents.kept if root.id in name]


def test_what_nobody_follows_any_more_is_deleted_as_a_whole(start: Start) -> None:
    documents = FakeDocuments()
    live = start(FakeEngine(documents=documents), atlas={"session_ttl": 1000.0})
    client = live.openai()
    old = client.responses.create(model="any", input="old")
    leaf = client.responses.create(model="any", input="leaf", previous_response_id=old.id)
    kept = client.responses.create(model="any", input="kept")
    for name in documents.written:
        documents.written[name] -= 2000
    client.responses.create(model="any", input="on", previous_response_id=kept.id)
    persistence = live.lifecycle._persistence
    loop = live.lifecycle.supervisor.bridge._loop
    asyncio.run_coroutine_threadsafe(persistence._expire_responses(), loop).result(PATIENCE)
    assert client.responses.retrieve(kept.id) == kept
    for gone in (old, leaf):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone.id)
    assert len(documents.kept) == 2


def test_another_owners_responses_are_not_there(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one:a\ntwo:b\n")
    live = start(server={"api_keys_file": str(keys)})
    mine, theirs = live.openai(api_key="one"), live.openai(api_key="two")
    made = mine.responses.create(model="any", input="secret", conversation="shared name")
    for gone in (theirs.responses.retrieve, theirs.responses.delete, theirs.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)
    with pytest.raises(openai.BadRequestError):
        theirs.responses.create(model="any", input="x", previous_response_id=made.id)
    theirs.responses.create(model="any", input="x", conversation="shared name")
    assert prompt_of(live.engine) == [("user", "x")]


def test_input_items_come_in_pages(client: openai.OpenAI, live: Live) -> None:
    texts = [f"text {index}" for index in range(5)]
    made = client.responses.create(model="any", input=[{"role": "user", "content": text} for text in texts])
    listed = [item.content[0].text for item in client.responses.input_items.list(made.id, limit=2)]  # type: ignore[union-attr]
    assert listed == texts[::-1]
    page = live.http.get(f"{PATH}/{made.id}/input_items", params={"order": "asc", "limit": 3}).json()
    ResponseItemList.model_validate(page, strict=True)
    assert [item["content"][0]["text"] for item in page["data"]] == texts[:3]
    assert page["has_more"]
    for wrong in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "msg_none"}):
        answer = live.http.get(f"{PATH}/{made.id}/input_items", params=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(wrong)))


def test_input_is_messages_of_every_shape(client: openai.OpenAI, live: Live) -> None:
    client.responses.create(
        model="any",
        input=[
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"role": "user", "content": [{"type": "input_text", "text": "b"}, {"type": "input_text", "text": "c"}]},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "d", "annotations": []},
                    {"type": "refusal", "refusal": "e"},
                ],
            },
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"role": "user", "content": "f"},
        ],
    )
    assert prompt_of(live.engine) == [("system", "a"), ("user", "b\nc"), ("assistant", "d\ne"), ("user", "f")]


def test_a_format_is_a_grammar(client: openai.OpenAI, live: Live) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    made = client.responses.create(
        model="any", input="x", text={"format": {"type": "json_schema", "name": "n", "schema": schema}}
    )
    assert live.engine.requests[-1].grammar.schema.wanted == schema
    assert made.text is not None
    assert made.text.format is not None
    assert made.text.format.type == "json_schema"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": "x" * 5000}, "input"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tools[0].type"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "f"}]}]},
            "tools[0].tools[0].type",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"include": ["message.text"]}, "include[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"previous_response_id": "resp_none", "conversation": "c"}, "previous_response_id"),
        ({"conversation": "a/b"}, "conversation"),
        ({"conversation": "resp_1"}, "conversation"),
        ({"atlas": {"session_id": "s"}}, "atlas.session_id"),
        ({"atlas": {"memory_layers": 11}}, "atlas.memory_layers"),
        ({"never_heard_of": 1}, "never_heard_of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_change_the_answer_is_refused_by_name(live: Live, fields: dict[str, Any], param: str) -> None:
    answer = live.post(PATH, {"input": "x", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert not any(name.startswith("resp_none") for _, name in live.engine.documents.kept)


def test_hints_pass(live: Live) -> None:
    hints = {
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "reasoning": {"effort": "low"},
        "truncation": "auto",
        "parallel_tool_calls": False,
        "max_tool_calls": 3,
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "tools": [],
        "tool_choice": "auto",
        "background": False,
        "stream_options": {"include_obfuscation": False},
    }
    answer = live.post(PATH, {"input": "x", **hints})
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json(), strict=True)


def test_a_failure_in_a_stream_is_an_event_and_keeps_nothing(live: Live) -> None:
    kept = len(live.engine.documents.kept)
    live.engine.fail_after = 3
    found = list(events(live, {"input": QUESTION}))
    last = EVENTS.validate_python(found[-1][1], strict=True)
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert [data["sequence_number"] for _, data in found] == [*range(len(found))]
    assert live.post(PATH, {"input": QUESTION}).status_code == 500
    assert len(live.engine.documents.kept) == kept


def test_what_cannot_be_kept_is_not_answered_as_if_it_were(live: Live) -> None:
    live.engine.documents.fail = [StorageFull("no space left"), OSError(5, "broken")]
    full = live.post(PATH, {"input": "x"})
    assert (full.status_code, full.json()["error"]["code"]) == (507, "storage_full")
    broken = live.post(PATH, {"input": "x"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (503, "storage_failed")
    live.engine.documents.fail = [StorageFull("no space left")]
    live.engine.delay = 0.01  # so that the stream has begun
    assert list(events(live, {"input": "x"}))[-1][0] == "response.failed"


def test_a_client_that_leaves_keeps_nothing_and_frees_its_place(live: Live, client: openai.OpenAI) -> None:
    root = client.responses.create(model="any", input="root")
    live.engine.delay = 0.02
    with client.responses.create(model="any", input="x" * 2000, previous_response_id=root.id, stream=True) as stream:
        next(iter(stream))
    wait_for(lambda: live.engine.running == 0)
    live.engine.delay = 0.0
    wait_for(lambda: not any(f".{root.id}." in name for _, name in live.engine.documents.kept))
    client.responses.create(model="any", input="again", previous_response_id=root.id)
    assert session_of(live.engine) == root.id


def test_a_branch_that_is_given_up_leaves_no_session(live: Live, client: openai.OpenAI) -> None:
    root = client.responses.create(model="any", input="root")
    child = client.responses.create(model="any", input="child", previous_response_id=root.id)
    live.engine.delay = 0.02
    for _ in range(2):
        with client.responses.create(
            model="any", input="x" * 2000, previous_response_id=root.id, stream=True
        ) as stream:
            next(iter(stream))
    assert len(live.engine.sessions.forks) == 2
    wait_for(lambda: {name for _, name in live.engine.sessions.live} == {root.id})
    assert client.responses.retrieve(child.id) == child


def test_tokens_are_counted_with_what_came_before(live: Live, client: openai.OpenAI) -> None:
    root = client.responses.create(model="any", input="root")
    body = {"input": "next", "previous_response_id": root.id}
    count = live.post(f"{PATH}/input_tokens", body).json()
    made = client.responses.create(model="any", input="next", previous_response_id=root.id)
    assert made.usage is not None
    assert count == {"object": "response.input_tokens", "input_tokens": made.usage.input_tokens}


def test_without_a_memory_chains_are_plain_conversations(start: Start) -> None:
    live = start(atlas={"enabled": False})
    client = live.openai()
    root = client.responses.create(model="any", input="root")
    client.responses.create(model="any", input="next", previous_response_id=root.id)
    client.responses.create(model="any", input="branch", previous_response_id=root.id)
    assert [request.memory for request in live.engine.requests] == [None] * 3
    assert [text for _, text in prompt_of(live.engine)] == ["root", root.output_text, "branch"]


def test_servers_that_share_a_store_know_each_others_responses(start: Start) -> None:
    one, other = start(), start()
    one.engine.documents.shared = True
    other.engine.documents = one.engine.documents
    first, second = one.openai(), other.openai()
    root = first.responses.create(model="any", input=QUESTION)
    assert second.responses.retrieve(root.id) == root
    after = second.responses.create(model="any", input="And you?", previous_response_id=root.id)
    last = first.responses.create(model="any", input="Well?", previous_response_id=after.id)
    assert [text for role, text in prompt_of(one.engine) if role == "user"] == [QUESTION, "And you?", "Well?"]
    conversation = first.conversations.create(items=[{"type": "message", "role": "user", "content": "secret"}])
    for client in (first, second):
        client.responses.create(model="any", input="x", conversation=conversation.id)
    (item,) = [
        one for one in second.conversations.items.list(conversation.id) if '"text":"secret"' in one.model_dump_json()
    ]
    first.conversations.items.delete(item.id, conversation_id=conversation.id)
    second.responses.create(model="any", input="y", conversation=conversation.id)
    assert "secret" not in [text for _, text in prompt_of(other.engine)]
    second.responses.delete(last.id)
    with pytest.raises(openai.NotFoundError):
        first.responses.retrieve(last.id)
