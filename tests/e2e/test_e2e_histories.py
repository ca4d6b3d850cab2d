"""What clients send of a conversation, through a real process whose template has a system message of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests import tiny_model
from tests.e2e.real_server import RealServer, content, remember, text

SYSTEM = "You are a tiny assistant of few words and no manners."
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def talker(
    launch: Callable[..., RealServer], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RealServer, dict[int, int]]:
    """A server, and a bias by which the model answers in letters that a tokenizer reads back as it wrote them."""
    folder = tmp_path_factory.mktemp("talker")
    shape = dataclasses.replace(tiny_model.LLAMA, context=1024, template=TEMPLATE)
    model = tiny_model.write_model(folder / "talker.gguf", shape)
    server = launch(files=(model, tiny_model.write_adapter(folder / "talker.safetensors", model)))
    letters = [server.post("/tokenize", {"content": letter}).json()["tokens"][0] for letter in "qxzjkv"]
    return server, dict.fromkeys(letters, 60)


@dataclasses.dataclass
class Client:
    """A session of a server."""

    server: RealServer
    bias: dict[int, int]
    session: str

    def ask(self, *messages: tuple[str, str], **atlas: Any) -> tuple[str, dict[str, Any]]:
        """The answer, and what is said of it."""
        roles = {"s": "system", "u": "user", "a": "assistant"}
        answer = self.server.openai.chat.completions.create(
            model=self.server.name,
            messages=[{"role": roles[role], "content": said} for role, said in messages],  # type: ignore[misc]
            max_tokens=8,
            temperature=0,
            logit_bias={str(token): bias for token, bias in self.bias.items()},
            extra_body={"ignore_eos": True, "atlas": {**remember(self.session), **atlas}},
        )
        stats = answer.atlas_stats
        assert stats["tokens_reused"] == answer.usage.prompt_tokens_details.cached_tokens
        return content(answer), stats | {"read": answer.usage.prompt_tokens - stats["tokens_reused"]}

    @property
    def tokens(self) -> int:
        """Tokens the session holds."""
        return self.server.contexts()[self.session]["tokens"]

    def memory(self) -> dict[str, Any]:
        return self.server.http.get("/v1/atlas/memory", params={"session_id": self.session}).json()


@pytest.fixture
def client(talker: tuple[RealServer, dict[int, int]], request: pytest.FixtureRequest) -> Client:
    return Client(*talker, session=request.node.name)


def test_a_greeting_in_the_morning_forgets_nothing(client: Client) -> None:
    said = ["Hello", text("locker ", 120), "Hello", "What is my locker number?"]
    held, updates, effects = 0, 0, []
    for one in said:
        _, stats = client.ask(("u", one))
        effects.append(stats["history"])
        assert client.tokens > held
        held = client.tokens
        found = client.memory()
        assert found["total_updates"] >= updates
        updates = found["total_updates"]
    assert effects == ["new", "appended", "appended", "appended"]
    assert updates > 0
    _, stats = client.ask(("u", "Hello"), regenerate=True)
    assert stats["history"] == "rolled_back"
    assert client.tokens < held, "it was asked for"


def test_of_a_trimmed_conversation_only_the_new_turn_is_read(client: Client) -> None:
    turns: list[tuple[str, str]] = [("s", "Be brief."), ("u", text("first ", 60))]
    for turn in range(3):
        answer, stats = client.ask(*turns)
        assert stats["history"] == ("continued" if turn else "new")
        turns += [("a", answer), ("u", f"and then {turn}?")]
    new = stats["read"]
    held = client.tokens
    answer, stats = client.ask(turns[0], *turns[3:])
    assert stats["history"] == "continued"
    assert stats["read"] == new, "as much as of a whole conversation"
    assert client.tokens == held + new + 7
    edited = [turns[0], *turns[3:-1], ("u", "or rather 7?")]
    _, stats = client.ask(*edited)
    assert stats["history"] == "rolled_back"
    assert stats["read"] <= new + 3


def test_what_the_template_says_of_itself_is_said_once(client: Client, talker: tuple[RealServer, Any]) -> None:
    server, _ = talker

    def count(said: str) -> int:
        return len(server.post("/tokenize", {"content": said, "parse_special": True}).json()["tokens"])

    client.ask(("u", "Tell me about memory."))
    for _ in range(3):
        before = client.tokens
        _, stats = client.ask(("u", "continue"))
        assert stats["history"] == "appended"
        own = count(SYSTEM) + count("system\n") + 3
        assert stats["tokens_reused"] >= count(SYSTEM)
        assert client.tokens - before < own, "not even the template's own message was read"
    before = client.tokens
    _, stats = client.ask(("s", "Speak French."), ("u", "continue"))
    first = client.tokens - before
    before = client.tokens
    _, stats = client.ask(("s", "Speak French."), ("u", "continue"))
    assert client.tokens - before < first, "a client's own is read once, when it is new"
