"""What clients do to break a server: headers, protocol abuse, leaving, never reading; and what must not leak."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import httpx
import pytest

from atlas_jax.engine.api import EngineError
from tests.server.live_server import Live, Start, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


def code_of(response: httpx.Response) -> Any:
    return response.json()["error"]["code"]


# --- headers and protocol -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx", "a, b"]
)
def test_other_content_types(live: Live, kind: str) -> None:
    headers = {"content-type": kind} if kind else {}
    response = live.http.post(COMPLETIONS, content=b'{"prompt":"x"}', headers=headers)
    assert (response.status_code, code_of(response)) == (415, "unsupported_media_type")
    response = live.http.post("/v1/atlas/memory/reset", content=b"{}", headers=headers)
    assert (response.status_code, code_of(response)) == (415, 415)


def test_json_content_type_with_parameters(live: Live) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert live.http.post(COMPLETIONS, content=b'{"prompt":"x"}', headers=headers).status_code == 200


def raw_get(live: Live, host: bytes, path: bytes = b"/health") -> bytes:
    return live.raw(b"GET " + path + b" HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"Host: localhost\r\n", b"200"),
        (b"Host: LocalHost:1234\r\n", b"200"),
        (b"Host: atlas.localhost:8080\r\n", b"200"),
        (b"Host: host.docker.internal:8080\r\n", b"200"),
        (b"Host: atlas:8080\r\n", b"400"),
        (b"Host: atlas.local\r\n", b"400"),
        (b"Host: host.docker.internal.evil.example\r\n", b"400"),
        (b"Host: 127.0.0.1:8080\r\n", b"200"),
        (b"Host: [::1]:8080\r\n", b"200"),
        (b"Host: evil.example\r\n", b"400"),
        (b"Host: 127.0.0.1.evil.example\r\n", b"400"),
        (b"Host: localhost.evil.example\r\n", b"400"),
        (b"Host: 127.0.0.1:99999\r\n", b"400"),
        (b"Host: a/b?\r\n", b"400"),
        (b"Host: \r\n", b"400"),
        (b"Host: 10.0.0.1\r\n", b"400"),
        (b"", b"400"),
        (b"Host: localhost\r\nHost: evil\r\n", b"400"),
        (b"Host: evil\r\nX-Forwarded-Host: localhost\r\n", b"400"),
    ],
)
def test_host_header(live: Live, host: bytes, status: bytes) -> None:
    assert raw_get(live, host).split(b" ")[1] == status


def test_a_request_without_a_host_is_no_browser(live: Live) -> None:
    assert live.raw(b"GET /health HTTP/1.0\r\n\r\n").split(b" ")[1] == b"200"


def test_allowed_hosts(start: Start) -> None:
    live = start(server={"allowed_hosts": ("api.example",)})
    assert raw_get(live, b"Host: API.example:443\r\n").split(b" ")[1] == b"200"
    assert raw_get(live, b"Host: other.example\r\n").split(b" ")[1] == b"400"
    live = start(server={"allowed_hosts": ("*",)})
    assert raw_get(live, b"Host: other.example\r\n").split(b" ")[1] == b"200"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /none HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 300_000 + b"\r\n\r\n",
        b"GET /none HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1e3\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET http://evil/ HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ],
    ids=[
        "long header",
        "many headers",
        "CL and TE",
        "negative CL",
        "float CL",
        "garbage",
        "absolute form",
        "options *",
    ],
)
def test_protocol_abuse_ends_in_a_refusal(live: Live, request_bytes: bytes) -> None:
    answer = live.raw(request_bytes, timeout=1)
    # A connection reset while the client is still sending leaves no answer to read.
    assert not answer or answer.split(b" ")[1] in (b"400", b"404", b"405", b"413"), answer[:200]
    assert live.http.get("/health").status_code == 200


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    first = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    second = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = live.raw(first + second)
    assert answer.index(b"200 OK") < answer.index(b"404 Not Found")


def test_a_websocket_upgrade_is_not_one(live: Live) -> None:
    answer = live.raw(
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        timeout=0.5,
    )
    assert b"101" not in answer.split(b"\r\n")[0]


def test_request_ids_are_not_taken_from_anyone(live: Live) -> None:
    for given in ("x" * 5000, "a b", "\u00e9"):
        response = live.http.get("/health", headers={"X-Request-Id": given.encode("latin-1")})
        assert response.headers["x-request-id"] != given
        assert len(response.headers["x-request-id"]) == 32
    assert live.http.get("/health").headers["x-content-type-options"] == "nosniff"


def test_session_headers_that_are_refused(live: Live) -> None:
    for given in (b"../x", b"x" * 129, b"a\tb", "\u00e9".encode("latin-1"), b""):
        response = live.http.post(COMPLETIONS, json={"prompt": "x"}, headers={"X-Session-ID": given})
        assert response.status_code == 400, given
    assert live.engine.requests == []


def preflight(live: Live, origin: str) -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return live.http.options(CHAT, headers=headers)


def test_cors_is_off_unless_origins_are_listed(start: Start, live: Live) -> None:
    assert "access-control-allow-origin" not in preflight(live, "https://app.example").headers
    listed = start(server={"cors_origins": ("https://app.example",)})
    answer = preflight(listed, "https://app.example")
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in answer.headers
    for origin in ("https://evil.example", "null", "https://app.example.evil"):
        assert "access-control-allow-origin" not in preflight(listed, origin).headers
    refused = listed.http.post(COMPLETIONS, json={"prompt": 5}, headers={"Origin": "https://app.example"})
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert refused.headers["vary"] == "Origin"


# --- what leaks ---------------------------------------------------------------------------------------------------
def test_errors_inside_the_engine_tell_nothing(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    live.engine.submit_errors = [
        RuntimeError("/secret/path key=abc"),
        KeyError("secret"),
        EngineError("Told on purpose"),
    ]
    for message in ("Internal server error", "Internal server error", "Told on purpose"):
        response = live.post(COMPLETIONS, {"prompt": "x"})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == message
        assert "secret" not in response.text
        assert "Error" not in response.text.replace("Internal server error", "")
    live.engine.submit_errors = [RuntimeError("/secret/path")]
    assert "secret" not in live.post(COMPLETIONS, {"prompt": "x", "stream": True}).text


def test_prompts_and_names_stay_out_of_the_log(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "the-secret-sentence"
    live.engine.submit_errors = [RuntimeError("broken")]
    live.post(COMPLETIONS, {"prompt": secret})
    live.post(COMPLETIONS, {"prompt": secret, "atlas": {"session_id": "visible"}})
    live.post(COMPLETIONS, {"prompt": [secret, 5]})
    live.post(CHAT, {"messages": [{"role": "user", "content": secret}], "temperature": -1})
    live.post("/v1/atlas/memory/save", {"context_id": "c", "state": {"x": secret}})
    mine = [record for record in caplog.records if record.name.startswith(("atlas", "server", "uvicorn", "litestar"))]
    assert mine
    assert not any(secret in record.getMessage() or secret in str(record.exc_info) for record in mine)


def test_metrics_do_not_grow_with_what_clients_make_up(live: Live) -> None:
    def series() -> set[str]:
        text = live.http.get("/metrics").text
        return {line.split(" ")[0] for line in text.splitlines() if not line.startswith("#")}

    for _ in range(2):
        series()
    live.http.get("/warm/up")
    live.post(COMPLETIONS, {"prompt": "x", "model": "warm"})
    live.post(COMPLETIONS, {"prompt": "x", "atlas": {"session_id": "warm"}})
    live.http.request("WARM", "/warm")
    live.http.get("/v1/models/warm")
    before = series()
    for number in range(50):
        live.http.get(f"/random/{number}")
        live.http.get(f"/v1/models/{number}")
        live.post(COMPLETIONS, {"prompt": "x", "model": f"m{number}"})
        live.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, "atlas": {"session_id": f"s{number}"}})
        live.http.request(f"METHOD{number}", "/x")
    assert series() == before
    assert 'atlas_http_requests_total{method="POST",route="/v1/completions",status="200"}' in series()


# --- clients that leave -------------------------------------------------------------------------------------------
def head(body: bytes, path: str = COMPLETIONS) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode()


def send(live: Live, body: dict[str, Any], path: str = COMPLETIONS) -> socket.socket:
    data = json.dumps(body).encode()
    connection = live.connect()
    connection.sendall(head(data, path) + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(live: Live, stream: bool) -> None:
    live.engine.delay = 0.005
    body = {"prompt": "x", "ignore_eos": True, "max_tokens": -1, "stream": stream, "n": 3}
    connection = send(live, body)
    wait_for(lambda: live.engine.running == 3)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_for(lambda: live.engine.running == 0)
    wait_for(lambda: live.admission.running == 0)
    current = live.http.get("/v1/atlas/metrics").json()["data"]["current"]
    assert current["active_requests"] == 0


def test_a_client_that_leaves_before_or_inside_its_body(live: Live) -> None:
    connection = live.connect()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
    connection.close()
    connection = live.connect()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 1000\r\n\r\n{"prompt":'
    )
    connection.close()
    assert live.http.get("/health").status_code == 200
    wait_for(lambda: 'route="/v1/completions",status="499"' in live.http.get("/metrics").text)


def test_a_body_that_stops_coming(start: Start) -> None:
    live = start(server={"client_timeout": 0.3})
    answer = live.raw(head(b"x" * 1000) + b'{"prompt":', timeout=3)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


def test_a_client_that_never_reads_loses_its_place(start: Start) -> None:
    live = start(server={"client_timeout": 0.5})
    live.engine.delay = 0.001  # or its answer has ended before anybody notices
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", live.port))
    data = json.dumps({"prompt": "x" * 2000, "ignore_eos": True, "max_tokens": -1, "stream": True}).encode()
    connection.sendall(head(data) + data)
    wait_for(lambda: live.engine.running == 1)
    wait_for(lambda: live.engine.running == 0 and live.admission.running == 0, 15)
    assert live.engine.cancels >= 1
    connection.close()


def test_waiting_clients_that_leave_free_the_queue(start: Start) -> None:
    live = start(server={"max_concurrent": 1, "max_waiting": 4})
    live.engine.delay = 0.005
    first = send(live, {"prompt": "x", "ignore_eos": True, "max_tokens": -1})
    wait_for(lambda: live.admission.running == 1)
    others = [send(live, {"prompt": "x", "stream": True}) for _ in range(4)]
    wait_for(lambda: live.admission.waiting == 4)
    refused = live.post(COMPLETIONS, {"prompt": "x"})
    assert (refused.status_code, code_of(refused)) == (503, "overloaded")
    assert "retry-after" in refused.headers
    for connection in others[:3]:
        connection.close()
    wait_for(lambda: live.admission.waiting == 1)
    first.close()
    assert others[3].recv(100).startswith(b"HTTP/1.1 200")
    others[3].close()
    wait_for(lambda: live.admission.running == 0)
