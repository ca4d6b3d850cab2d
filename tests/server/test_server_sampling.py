"""What requests get for the sampling fields they leave out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import SamplingParams
from atlas_jax.gguf import recommended_sampling
from server.config.settings import SamplingSection, Settings
from server.config.sources import load
from server.services.sampling import default_sampling
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start, make_settings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FIELDS = SamplingSection.__struct_fields__
OURS = {"temperature": 0.5, "top_p": 0.95, "min_p": 0.1}


def drawn(live: Live, path: str = CHAT, **fields: Any) -> SamplingParams:
    """The sampling the engine got."""
    prompt = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    response = live.post(path, {**prompt, "max_tokens": 1, **fields})
    assert response.status_code == 200, response.text
    sampling: SamplingParams = live.engine.requests[-1].sampling
    return sampling


def begin(sampling: dict[str, Any], recommended: dict[str, float]) -> Live:
    engine = FakeEngine()
    engine.model = dataclasses.replace(engine.model, sampling=recommended)
    base = make_settings()
    return Live(Settings(server=base.server, sampling=SamplingSection(**sampling), atlas=base.atlas), engine)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_fields_left_out_and_nulls_take_the_projects_defaults(live: Live, path: str) -> None:
    expected = SamplingParams(**OURS)
    assert drawn(live, path) == expected
    assert drawn(live, path, **dict.fromkeys(FIELDS)) == expected


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_a_request_says_wins(live: Live, path: str) -> None:
    own = SamplingParams()  # the model's own distribution
    said = {name: getattr(own, name) for name in FIELDS}
    assert drawn(live, path, **said) == own
    assert drawn(live, path, temperature=1).temperature == 1.0
    assert drawn(live, path, temperature=0).temperature == 0.0
    assert drawn(live, path, top_p=1, min_p=0) == SamplingParams(temperature=0.5)


def test_the_official_client_gets_the_temperature_it_sends(live: Live) -> None:
    live.openai().chat.completions.create(model="x", messages=[{"role": "user", "content": "x"}], temperature=1)
    assert live.engine.requests[-1].sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("sampling", "recommended", "expected"),
    [
        ({}, {}, OURS),
        ({}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
        ({"top_k": 40}, {}, {**OURS, "top_k": 40}),
        ({"temperature": 0.2, "min_p": 0.0}, {}, {"temperature": 0.2, "top_p": 0.95}),
        ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 64}, {"temperature": 0.0, "top_k": 64}),
        ({"repeat_penalty": 1.1}, {"min_p": 0.05}, {"min_p": 0.05, "repeat_penalty": 1.1}),
    ],
)
def test_the_operator_comes_before_the_model_and_the_model_before_the_project(
    sampling: dict[str, Any], recommended: dict[str, float], expected: dict[str, Any]
) -> None:
    live = begin(sampling, recommended)
    try:
        assert drawn(live) == SamplingParams(**expected)
        shown = live.http.get("/props").json()["default_generation_settings"]["params"]
        assert {name: shown[name] for name in FIELDS} == {
            name: getattr(SamplingParams(**expected), name) for name in FIELDS
        }
        assert drawn(live, temperature=1.5).temperature == 1.5
    finally:
        live.stop()


def test_the_settings_have_the_names_clients_use() -> None:
    loaded = load(environ={"ATLAS_TEMPERATURE": "0.3", "ATLAS_TOP_K": "20"}, flags={"sampling.top_k": "30"})
    assert (loaded.sampling.temperature, loaded.sampling.top_k, loaded.sampling.top_p) == (0.3, 30, None)


def test_a_file_recommends_by_llama_cpps_keys() -> None:
    metadata = {
        "general.sampling.temp": 0.6000000238418579,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.949999988079071,
        "general.sampling.min_p": 0.0,
        "general.sampling.penalty_repeat": 1.05,
        "general.sampling.mirostat": 0,
    }
    found = recommended_sampling(metadata)
    assert found == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.05}
    assert recommended_sampling({"general.name": "x"}) == {}


_ANYTHING = st.one_of(st.floats(), st.integers(), st.booleans(), st.text(), st.lists(st.integers()), st.none())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(["temp", "top_k", "top_p", "min_p", "penalty_repeat"]), _ANYTHING))
def test_no_file_makes_a_default_no_request_could_ask_for(values: dict[str, Any]) -> None:
    found = recommended_sampling({f"general.sampling.{name}": value for name, value in values.items()})
    sampling = default_sampling(SamplingSection(), found)
    asked = {name: str(getattr(sampling, name)) for name in FIELDS}
    loaded = load(environ={f"ATLAS_{name.upper()}": text for name, text in asked.items()}).sampling
    assert all(getattr(loaded, name) == getattr(sampling, name) for name in FIELDS)


def test_a_strangers_recommendation_needs_no_restart(start: Start) -> None:
    live = start()
    live.engine.model = dataclasses.replace(live.engine.model, sampling={"temperature": 0.25})
    assert drawn(live) == SamplingParams(temperature=0.25)
