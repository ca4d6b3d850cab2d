"""A turn with tool calls that comes back in the conversation is what the session holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.engine.chat import Chat
from atlas_jax.engine.sessions.continuation import Continuation, Prompt, continuation
from atlas_jax.engine.sessions.history import History
from atlas_jax.gguf import ChatTemplate, GGUFFile, Tokenizer
from server.schemas.chat import ChatMessage, ChatRequest
from server.services.tokenization import plain_messages
from server.tool_calls.choice import chosen_tools
from server.tool_calls.conversation import ChatForm
from server.validation import parse
from tests import tiny_model
from tests.gguf.test_gguf_template_facts import QWEN
from tests.server.tool_calls.reading import read

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("get", "get_weather")]
CALL = '<tool_call>\n{"name": "get", "arguments": {"a": "é", "b": [1, 2.5]}}\n</tool_call>'
ANSWERS = {
    "one call": CALL,
    "two calls": f"{CALL}\n{CALL.replace('get', 'get_weather')}",
    "text and a call": f"I look.\n{CALL}",
}
OWN_SPACING = CALL.replace(": ", ":").replace(", ", ",")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tiny_model.write_model(tmp_path_factory.mktemp("sessions") / "tiny.gguf")
    with GGUFFile.open(path) as file:
        return Tokenizer.from_metadata(file.metadata)


def returned(tokenizer: Tokenizer, template: str, answer: str) -> tuple[Continuation, History]:
    """What becomes of a session when a client sends back an answer of it as it was told of it, with a result."""
    chat = Chat(tokenizer, ChatTemplate(template))
    form = ChatForm(chat.facts)
    tools = chosen_tools(parse(ChatRequest, {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}))
    assert tools is not None

    def written(messages: list[dict[str, Any]]) -> tuple[list[int], Any]:
        plain = plain_messages(parse(list[ChatMessage], messages))
        given, told = form.write(plain, tools.told)
        return chat.tokens(given, tools=told), chat.frame(given, None, told)

    asked = [{"role": "user", "content": "What is it?"}]
    prompt, _ = written(asked)
    drawn = tokenizer.encode(answer, add_special=False, parse_special=True)
    history = History()
    history.extend([*prompt, *drawn])
    history.answered(len(prompt), len(prompt) + len(drawn) + 1)
    end = tokenizer.special_tokens["<|im_end|>"]
    found = read(form.style, [answer], names=["get", "get_weather"])
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, (name, arguments) in zip(found.ids, found.calls, strict=True)
    ]
    assert calls
    turn: dict[str, Any] = {"role": "assistant", "content": found.content or None, "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": id_, "content": "7"} for id_ in found.ids]
    tokens, frame = written([*asked, turn, *results])
    return continuation(history, Prompt(np.array(tokens, "<i4"), pending=end, chat=frame)), history


@pytest.mark.parametrize("template", [QWEN, tiny_model.CHAT_TEMPLATE], ids=["native", "told"])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_call_that_comes_back_is_recognised(tokenizer: Tokenizer, template: str, answer: str) -> None:
    decided, history = returned(tokenizer, template, answer)
    assert (decided.effect, decided.keep, decided.skip) == ("continued", history.length, history.length)


def test_a_call_in_a_spelling_of_the_models_own(tokenizer: Tokenizer) -> None:
    # A template writes calls anew, so the turn is read again, as one that was edited.
    decided, history = returned(tokenizer, QWEN, OWN_SPACING)
    assert decided.effect == "rolled_back"
    assert history.replies[0][0] <= decided.keep < history.length
