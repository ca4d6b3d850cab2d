"""Whatever a client sends, the server answers: never a 500, never a hang, and always an error a client can read."""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server.errors import BadRequest
from server.schemas.atlas import AtlasDefaults, AtlasOptions, LoadRequest, SaveRequest
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.runtime_config import ConfigChange
from server.services.memory_options import check_name, plan_memory
from server.services.unsupported import _NEUTRAL
from server.validation import parse
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, make_settings

ATLAS_FIELDS = AtlasOptions.__struct_fields__
FIELDS = sorted({*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__, *_NEUTRAL})
# What is likely to be misread: bounds, types that look like others, names of fields in the wrong place.
ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 10, 11, 128, 512, 2**31, 2**63, 2**64, 0.0, 0.5, 1.0, 1e-45, 1e300]
    + ["", "x", "5", "\u0000"]
    + [[], [[]], {}, [None], ["x"], [1, "x"], {"x": 1}, {"1": 1.5}, {"type": "text"}, {"include_usage": True}]
)  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
ANY = ODD | JSON
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "refusal", "image_url", ""])}, optional={"text": ANY})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "x"])},
    optional={"content": st.text(max_size=20) | st.lists(PART, max_size=2) | ANY, "name": ANY, "tool_calls": ANY},
)
MESSAGES = st.lists(MESSAGE, max_size=3) | ANY
ATLAS = st.dictionaries(st.sampled_from(ATLAS_FIELDS), ANY, max_size=4) | ANY
BODY = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=20) | st.lists(st.integers(-5, 300), max_size=5) | ANY,
        "messages": MESSAGES,
        "atlas": ATLAS,
        "max_tokens": st.integers(0, 5),
    },
).flatmap(lambda base: st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=3).map(lambda more: {**base, **more}))
PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/atlas/config",
    "/v1/atlas/memory/save",
    "/v1/atlas/memory/load",
    "/v1/atlas/memory/list",
    "/v1/atlas/memory/delete",
    "/v1/atlas/memory/reset",
    "/tokenize",
    "/detokenize",
    "/apply-template",
]
QUICK = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server = Live(make_settings(), FakeEngine())
    yield server
    server.stop()


def check(live: Live, path: str, content: bytes) -> None:
    response = live.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404, 413), (response.status_code, response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["code"], int if path.startswith("/v1/atlas") else str | None)
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        response.json()


@QUICK
@given(path=st.sampled_from(PATHS[:2]), body=BODY)
def test_generation_requests(live: Live, path: str, body: dict[str, Any]) -> None:
    body.setdefault("max_tokens", 2)
    if body.get("max_tokens") in (-1, None, 512, 2**31) or body.get("n_predict") in (-1, 512, 2**31):
        body["stop"] = "x"  # or a runaway answer would be right
        body.update(max_tokens=3, n_predict=3)
    check(live, path, json.dumps(body).encode())


@QUICK
@given(path=st.sampled_from(PATHS), body=st.dictionaries(st.text(max_size=10), ANY, max_size=4) | ANY)
def test_arbitrary_json(live: Live, path: str, body: Any) -> None:
    check(live, path, json.dumps(body).encode())


@QUICK
@given(
    path=st.sampled_from(PATHS[3:8]),
    body=st.dictionaries(
        st.sampled_from(["filename", "session_id", "context_id", "state", "limit", "after", "x"]), ANY, max_size=3
    ),
)
def test_memory_requests(live: Live, path: str, body: dict[str, Any]) -> None:
    check(live, path, json.dumps(body).encode())


@QUICK
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=200))
def test_arbitrary_bytes(live: Live, path: str, content: bytes) -> None:
    check(live, path, content)


@settings(max_examples=500, deadline=None)
@given(
    kind=st.sampled_from([CompletionRequest, ChatRequest, AtlasOptions, ConfigChange, SaveRequest, LoadRequest]),
    body=BODY | ANY,
)
def test_parsing_raises_nothing_else(kind: Any, body: Any) -> None:
    with contextlib.suppress(BadRequest):
        assert isinstance(parse(kind, body), kind)


@settings(max_examples=300, deadline=None)
@given(
    atlas=st.none() | st.dictionaries(st.sampled_from(ATLAS_FIELDS), ODD, max_size=5),
    header=st.none() | st.text(max_size=12),
)
def test_memory_plans_are_within_the_contract(atlas: Any, header: str | None) -> None:
    try:
        options = None if atlas is None else parse(AtlasOptions, atlas)
        plan = plan_memory(
            options, header, owner="o", defaults=AtlasDefaults(), unavailable=None, max_window=2048, memory_dim=96
        )
    except BadRequest:
        return
    assert 1 <= plan.batch_size <= 32
    assert (plan.params is None) == ((atlas is None and header is None) or (atlas or {}).get("enabled") is False)
    if plan.params is not None:
        memory = plan.params
        assert 1 <= memory.memory_layers <= 10
        assert memory.window_size % 128 == memory.update_frequency % 128 == 0
        assert 128 <= memory.window_size <= 2048
        assert memory.omega_window >= memory.update_frequency
        assert 0 <= memory.blend_ratio <= 1
        assert (memory.session is None) == (plan.session_id is None)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=140))
@example("0\u16800")
@example("\uf900")  # two ways to write one name are one name
def test_names_that_pass_are_harmless(name: str) -> None:
    try:
        checked = check_name(name, "x")
    except BadRequest:
        return
    assert checked == unicodedata.normalize("NFC", name)
    assert 1 <= len(checked) <= 128
    assert checked.isprintable()
    assert not set("/\\\u0000\n\r") & set(checked)
    assert checked not in (".", "..")
    checked.encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(ConfigChange.__struct_fields__), ODD, max_size=4))
def test_configuration_changes_completely_or_not_at_all(live: Live, values: dict[str, Any]) -> None:
    before = live.http.get("/v1/atlas/config").json()["data"]
    response = live.post("/v1/atlas/config", values)
    after = live.http.get("/v1/atlas/config").json()["data"]
    if response.status_code == 400:
        assert after == before
        return
    assert response.status_code == 200
    expected = {**before}
    for name, value in values.items():
        if value is not None or name in ("learning_rate", "use_muon"):
            expected[name] = value
    assert after == expected
    live.post("/v1/atlas/config", {name: value for name, value in before.items() if name in values})
