"""The guide of parts of one's own does what it says: its models are trained, exported and served as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.config import ConfigError
from atlas_jax.engine import Engine
from atlas_jax.memory import MemoryRule, chunked, init_params, init_state, make_tokens, parts, presets, scan
from atlas_jax.model.lm import LMConfig, create, generate, import_gguf, split
from tests.engine.offline import ask, request
from tests.patience import PATIENCE

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "extend.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
MODELS, PARTS = BLOCKS[:3], BLOCKS[3]
SMALLER = {"32, 32": "8, 8", "embed=128, ff=384": "embed=16, ff=24", "batch=8, length=256": "batch=2, length=32"}
SMALLER |= {"steps=500": "steps=2, warmup=1", '"MSMS"': '"MM"', '"GSGS"': '"G"', "chunk=16": "chunk=8, hidden=8"}
TEXT = b"what is read at test time is learned at test time. " * 8


def run(code: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, str(GUIDE), "exec"), scope)
    return scope


@pytest.mark.slow
@pytest.mark.parametrize(
    "index", [pytest.param(0, id="objective"), pytest.param(1, id="activation"), pytest.param(2, id="two rules")]
)
def test_a_model_of_the_guide_is_trained_exported_and_served(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = MODELS[index]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    for long, short in SMALLER.items():
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(TEXT)
    made = run(code)
    model, trained = made["model"], made["trained"]
    assert np.isfinite(trained.losses).all()
    read, params = import_gguf("model.gguf")
    assert read == model == LMConfig.from_json(model.to_json())
    jax.tree.map(np.testing.assert_array_equal, params, trained.params)

    prompt = list(TEXT[:8])
    wanted = list(generate(model, params, prompt, max_tokens=3, temperature=0.0))
    apply, _ = split(create(model, 0))
    text = [*prompt, *wanted] + [0] * (32 - len(prompt) - len(wanted))
    best = np.argmax(jax.jit(apply)(params, np.asarray([text]))[0], axis=-1)
    assert best[len(prompt) - 1 : len(prompt) + len(wanted) - 1].tolist() == wanted
    engine = Engine.open(model_path="model.gguf", cache_path=tmp_path / "cache", max_concurrent=1)
    try:
        assert ask(engine, request(prompt, 3)).tokens == wanted
    finally:
        engine.close(timeout=PATIENCE)


def test_parts_of_the_guide_agree_in_both_forms() -> None:
    rule = run(PARTS)["rule"]
    x = jax.random.normal(jax.random.key(1), (3, 2, 10, 16))
    params = init_params(rule, jax.random.key(0))
    tokens, state = make_tokens(rule, *x, alpha=0.9, theta=0.5), init_state(rule, params, (2,))
    found, wanted = (jax.jit(form, static_argnums=0)(rule, params, state, tokens) for form in (chunked, scan))
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-4)


def test_an_unknown_part_is_named_with_those_that_are_known() -> None:
    text = LMConfig(vocab=9, embed=8, ff=8, heads=2, pattern="M", rule=presets.titans(4, 4)).to_json()
    with pytest.raises(ConfigError, match=r"^objective: must be one of l2, dot, huber, .*got 'nowhere'"):
        LMConfig.from_json(text.replace('"objective": "l2"', '"objective": "nowhere"'))
    for field, wrong in (
        ("objective", "huber(1, 2)"),
        ("objective", "huber(x)"),
        ("activation", "gelu("),
        ("retention", ""),
    ):
        with pytest.raises(ConfigError, match=f"^{field}: "):
            MemoryRule(d_k=4, d_v=4, **{field: wrong})


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="taken"):
        parts.objective("l2")(lambda y, v: 0.0)
    with pytest.raises(ConfigError, match="letters"):
        parts.objective("two words")


def test_an_architecture_that_uses_a_weight_twice_or_not_at_all_is_refused() -> None:
    shapes = {"a": (4, 4), "b": (4, 4)}
    parts.architecture("twice", lambda rule: shapes)(lambda rule, apply, x: apply("a", apply("a", x)))
    parts.architecture("once", lambda rule: shapes)(lambda rule, apply, x: apply("a", x))
    for name, said in (("twice", "'a' twice"), ("once", r"does not apply \['b'\]")):
        rule = MemoryRule(d_k=4, d_v=4, memory=name)
        params, x = init_params(rule, jax.random.key(0)), np.ones((3, 4), np.float32)
        with pytest.raises(ConfigError, match=said):
            scan(rule, params, init_state(rule, params), make_tokens(rule, x, x, x))


def test_rules_by_layer_are_counted() -> None:
    rule = presets.deltanet(4, 4)
    base = LMConfig(vocab=9, embed=8, ff=8, heads=2, pattern="MSM", rule=(rule, rule), memory_heads=2)
    assert base.layer_rules == ((rule,), (), (rule,))
    with pytest.raises(ConfigError, match="3 entries for 2 layers"):
        base.replace(rule=(rule,) * 3)
    with pytest.raises(ConfigError, match="memory_heads"):
        base.replace(rule=(rule, (rule, rule, rule)))
