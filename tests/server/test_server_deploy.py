"""What `deploy/` has: images, their composition, alert rules and a dashboard, checked as far as that goes without Docker."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.config.sources import load
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, make_settings, wait_for
from tools.fetch_model import MODELS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
_NAME = re.compile(r"\batlas_[a-z0-9_]+")


# --- Docker -------------------------------------------------------------------------------------------------------
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "docker" / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(line.split(None, 1)[0], re.sub(r"\s+", " ", line.split(None, 1)[1])) for line in lines]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, those of the stages it is built on first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
            if base not in found:
                assert re.fullmatch(r"python:\$\{PYTHON\}(-slim)?", base), base
        elif name:
            found[name].append((word, rest))
    return found


def in_context(path: str) -> bool:
    """Whether `.dockerignore` lets a file of the project through."""
    kept = True
    for rule in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = rule.removeprefix("!")
        if rule and not rule.startswith("#") and (fnmatch.fnmatch(path, pattern) or path.startswith(pattern + "/")):
            kept = rule.startswith("!")
    return kept


def environment(stage: str) -> dict[str, str]:
    return dict(
        part.split("=", 1)
        for word, rest in stages()[stage]
        if word == "ENV"
        for part in shlex.split(rest)
        if "=" in part
    )


def test_there_is_an_image_for_each_kind_of_device_and_the_cpu_is_the_default() -> None:
    assert {"cpu", "cuda", "tpu"} <= set(stages())
    assert list(stages())[-1] == "cpu"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    installed = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    wanted = {one for rest in installed for group in re.findall(r"\.\[([a-z,-]+)\]", rest) for one in group.split(",")}
    assert wanted == {"serve", "object-store", "cuda", "tpu"} <= set(extras)


def test_everything_that_is_copied_is_there() -> None:
    for word, rest in instructions():
        if word != "COPY":
            continue
        *sources, _ = [part for part in rest.split() if not part.startswith("--")]
        stage = re.search(r"--from=(\S+)", rest)
        if stage:
            assert stage[1] in stages()
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert in_context(source), source
            assert (
                subprocess.run(["git", "ls-files", "--error-unmatch", source], cwd=ROOT, capture_output=True).returncode
                == 0
            )


@pytest.mark.parametrize(
    "path", ["data/models/x.gguf", ".git/config", ".venv/bin/python", "tests/conftest.py", "keys.txt"]
)
def test_what_no_image_needs_is_not_sent(path: str) -> None:
    assert not in_context(path)


@pytest.mark.parametrize("target", ["cpu", "cuda", "tpu"])
def test_the_command_of_an_image_is_one_that_the_server_takes(target: str) -> None:
    words = dict(stages()[target])
    command = json.loads(words["ENTRYPOINT"]) + json.loads(words["CMD"])
    assert command[0] == "atlas-jax"
    given = {name: value for name, value in environment(target).items() if name.startswith("ATLAS_")}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ATLAS_")}
    ran = subprocess.run(
        [sys.executable, "-m", "server", *command[1:], "--print-config"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environ, **given},
    )
    assert ran.returncode == 0, ran.stderr
    settings = json.loads(ran.stdout)
    assert (settings["server"]["host"], settings["server"]["port"]) == ("0.0.0.0", 8080)
    assert words["EXPOSE"] == "8080"
    volumes = json.loads(words["VOLUME"])
    assert settings["atlas"]["memory_path"] in volumes
    assert environment(target)["XDG_CACHE_HOME"] in volumes
    assert Path(settings["server"]["model"]).parent == Path("/models")


@pytest.mark.parametrize("target", ["cpu", "cuda", "tpu"])
def test_an_image_runs_as_a_user_of_its_own(target: str) -> None:
    users = [rest for word, rest in stages()[target] if word == "USER"]
    assert users == ["atlas"]
    made = next(rest for word, rest in stages()[target] if word == "RUN" and "useradd" in rest)
    for volume in json.loads(next(rest for word, rest in stages()[target] if word == "VOLUME")):
        assert volume in made  # a volume is made with the owner of its folder in the image


def test_the_model_of_the_image_is_the_one_that_is_fetched() -> None:
    assert environment("cpu")["ATLAS_MODEL"] == f"/models/{MODELS['default'].file}"


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text("utf-8"))
    return found


def test_the_composition_fits_the_images() -> None:
    document = compose()
    for name, service in document["services"].items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in document["volumes"] or (DEPLOY / "docker" / source).resolve().exists(), source
        if name == "prometheus":
            continue
        build = service["build"]
        folder = (DEPLOY / "docker" / build["context"]).resolve()
        assert folder == ROOT.resolve()
        assert (folder / build["dockerfile"]).is_file()
        assert build["target"] in stages()
        assert {"atlas_memory:/var/lib/atlas/memory", "atlas_cache:/var/cache/atlas"} <= set(service["volumes"])
        assert service["ports"] == ["127.0.0.1:8080:8080"]
        load(environ={**environment(build["target"]), **service["environment"]})


def checks() -> list[list[str]]:
    """The commands by which Docker finds out whether the server is well."""
    image = next(rest for word, rest in stages()["cpu"] if word == "HEALTHCHECK")
    services = [one["healthcheck"]["test"][1:] for one in compose()["services"].values() if "healthcheck" in one]
    return [json.loads(image[image.index("[") :]), *services]


def test_the_health_checks_see_whether_the_server_is_well(live: Live) -> None:
    for command in {tuple(one) for one in checks()}:
        assert command[:2] == ("python", "-c")
        code = command[2].replace("127.0.0.1:8080", f"127.0.0.1:{live.port}")
        assert code != command[2]
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
        closed = command[2].replace("127.0.0.1:8080", "127.0.0.1:1")
        assert subprocess.run([sys.executable, "-c", closed], capture_output=True).returncode == 1


# --- Prometheus and Grafana ---------------------------------------------------------------------------------------
def exported(live: Live) -> tuple[set[str], dict[str, set[str]]]:
    """Names of the samples of a server that has had something to do, and labels of each family."""
    live.post("/v1/completions", {"prompt": "x", "max_tokens": 2})
    live.post("/v1/completions", {"prompt": "x", "temperature": -1})
    names: set[str] = set()
    labels: dict[str, set[str]] = {}
    wait_for(lambda: "atlas_http_requests_total{" in live.http.get("/metrics").text)
    for family in text_string_to_metric_families(live.http.get("/metrics").text):
        names.add(family.name if family.type in ("gauge", "unknown") else "")
        for sample in family.samples:
            names.add(sample.name)
            labels.setdefault(sample.name, set()).update(sample.labels)
        if family.type == "counter":  # one with labels has no sample before the first
            names.add(family.name + "_total")
    return names, labels


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((DEPLOY / "prometheus" / "atlas-alerts.yml").read_text("utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """Every expression of the rules and of the dashboard."""
    board = json.loads((DEPLOY / "grafana" / "atlas-dashboard.json").read_text("utf-8"))
    queries = [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    return (
        [rule["expr"] for rule in rules()]
        + queries
        + [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    )


def test_every_metric_of_the_rules_and_the_dashboard_is_exported(live: Live) -> None:
    names, _ = exported(live)
    used = {name for expression in expressions() for name in _NAME.findall(expression)}
    assert used - names == set()
    assert len(used) > 25


def test_expressions_select_by_labels_that_there_are(live: Live) -> None:
    _, labels = exported(live)
    for expression in expressions():
        for name, selectors in re.findall(r"\b(atlas_[a-z0-9_]+)\{([^}]*)\}", expression):
            for label in re.findall(r"(\w+)\s*=~?", selectors):
                assert label == "instance" or label in labels.get(name, {label}), (name, label)
        assert expression.count("(") == expression.count(")")


def test_the_rules_name_reasons_and_statuses_that_occur() -> None:
    source = "".join(path.read_text("utf-8") for path in (ROOT / "server").rglob("*.py"))
    for rule in rules():
        for label, values in re.findall(r'(reason|outcome|status)=~?"([^"]+)"', rule["expr"]):
            for value in values.split("|"):
                assert (value if label == "status" else f'"{value}"') in source


def test_every_rule_says_what_is_wrong_and_how_bad_it_is() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"].endswith(".")


def test_prometheus_reads_the_rules_and_scrapes_the_server() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    assert all((DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("atlas", "/metrics")
    assert job["static_configs"][0]["targets"] == ["atlas:8080"]
    running = Live(make_settings(server={"host": "0.0.0.0"}), FakeEngine())
    try:
        answer = httpx.get(f"{running.url}/metrics", headers={"host": "atlas:8080"})
        assert answer.status_code == 200
    finally:
        running.stop()
