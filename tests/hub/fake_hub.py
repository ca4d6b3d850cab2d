"""A few routes of a model hub on this machine: what a repository holds, and its files with ranges and ETags."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repository.

    Attributes:
      token: who asks without it is told that there is nothing, or that its terms must be accepted.
      cut: after so many bytes of each file the connection breaks, this many times.
      announced: other sizes than the files have.
      damaged: files that come with a byte that is not theirs.
    """

    files: dict[str, bytes]
    commit: str = "c" * 40
    gated: bool = False
    token: str | None = None
    cut: tuple[int, int] = (0, 0)
    announced: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    status: int = 200
    stall: threading.Event | None = None


def etag(name: str, data: bytes) -> str:
    """Of a large file its SHA-256, of a text git's name of the blob."""
    if name.endswith((".gguf", ".safetensors")):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """The server.

    Attributes:
      repos: by name.
      seen: method, path and `Range` of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_HEAD(self) -> None:
                hub._answer(self)

            def do_GET(self) -> None:
                hub._answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self, ending: str = "") -> list[tuple[str, str | None]]:
        """Files whose bytes were asked for, and from where."""
        return [
            (path.rsplit("/", 1)[1], asked)
            for method, path, asked in self.seen
            if method == "GET" and "/resolve/" in path and path.endswith(ending)
        ]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.seen.append((request.command, path, request.headers.get("Range")))
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").split("/")
        repo = self.repos.get("/".join(parts[1:3]))
        allowed = repo is not None and repo.token in (None, (request.headers.get("Authorization") or "")[7:])
        if repo is None or (not allowed and not repo.gated):
            return self._send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo.status != 200:
            return self._send(request, repo.status, b"{}")
        if api:
            siblings = [
                {"rfilename": name, "size": repo.announced.get(name, len(data)), "blobId": etag("", data)}
                for name, data in repo.files.items()
            ]
            answer = {"id": "/".join(parts[1:3]), "sha": repo.commit, "siblings": siblings}
            return self._send(request, 200, json.dumps(answer).encode())
        if not allowed:
            return self._send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        name = "/".join(parts[5:])
        if parts[4] not in (repo.commit, "main") or name not in repo.files:
            return self._send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self._send_file(request, repo, name)

    def _send_file(self, request: BaseHTTPRequestHandler, repo: Repo, name: str) -> None:
        data = repo.files[name]
        headers = {"ETag": f'"{etag(name, data)}"', "X-Repo-Commit": repo.commit}
        if request.command == "HEAD":
            size = repo.announced.get(name, len(data))
            return self._send(request, 200, b"", headers | {"Content-Length": str(size)})
        if name in repo.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        begin, status = 0, 200
        if (asked := request.headers.get("Range")) is not None:
            begin, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if begin >= len(data):
                return self._send(request, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        at, times = repo.cut
        if times and at < len(data) - begin:
            repo.cut = (at, times - 1)
            self._send(request, status, data[begin : begin + at], headers | {"Content-Length": str(len(data) - begin)})
            if repo.stall is not None:
                request.wfile.flush()
                repo.stall.wait(60)
            return
        self._send(request, status, data[begin:], headers)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        request.close_connection = True  # so that nobody is answered once the server has stopped
        for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | (headers or {})).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
