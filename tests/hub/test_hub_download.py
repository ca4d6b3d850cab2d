"""Models of a hub on this machine: fetched, resumed, found again, and every way in which that fails in one line."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from atlas_jax.hub import HubError, find_model
from tests.hub.fake_hub import FakeHub, Repo, etag
from tests.patience import PATIENCE
from tests.server.live_server import wait_for

ROOT = Path(__file__).parents[2]
GGUF = "tiny-Q4_K_M.gguf"
DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    served = FakeHub()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    yield served
    served.stop()


def refused(repository: str = "org/tiny", **options: Any) -> str:
    with pytest.raises(HubError) as error:
        find_model(repository, **options)
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_a_file_is_fetched_once_and_found_without_a_network(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA, "README.md": b"#", "tiny-Q8_0.gguf": b"8"})
    path = find_model("org/tiny")
    assert (path.name, path.read_bytes()) == (GGUF, DATA)
    assert path.is_relative_to(tmp_path / "hub" / "models--org--tiny" / "snapshots")
    assert find_model("org/tiny:q4_k_m") == path
    assert hub.fetched() == [(GGUF, None)]
    # the library finds it where it would have put it
    assert file_download.try_to_load_from_cache("org/tiny", GGUF) == str(path)
    seen = len(hub.seen)
    assert find_model("org/tiny", offline=True) == path
    assert len(hub.seen) == seen
    hub.stop()
    assert find_model("org/tiny") == path


def test_all_parts_and_nothing_else(hub: FakeHub) -> None:
    parts = {f"Q4_K_M/tiny-Q4_K_M-{number:05}-of-00003.gguf": bytes([number]) * 10 for number in (1, 2, 3)}
    hub.repos["org/tiny"] = Repo({**parts, "mmproj-F16.gguf": b"image"})
    first = find_model("org/tiny")
    assert [one.read_bytes() for one in sorted(first.parent.iterdir())] == list(parts.values())
    assert first.name.endswith("-00001-of-00003.gguf")
    assert len(hub.fetched()) == 3
    (first.parent / "tiny-Q4_K_M-00002-of-00003.gguf").unlink()
    assert "lacks 1 of 3 parts" in refused(offline=True)
    assert find_model("org/tiny") == first
    assert len(hub.fetched()) == 3  # the blob was still there


def test_a_folder_of_safetensors(hub: FakeHub) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors": DATA}
    hub.repos["org/tiny"] = Repo({**files, "pytorch_model.bin": b"pickle"})
    folder = find_model("org/tiny")
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == files
    assert find_model("org/tiny", offline=True) == folder


def test_a_broken_connection_goes_on_where_it_was(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA}, cut=(100_000, 2))
    assert find_model("org/tiny").read_bytes() == DATA
    assert hub.fetched() == [(GGUF, None), (GGUF, "bytes=100000-"), (GGUF, "bytes=200000-")]


def test_a_fetch_that_was_given_up_goes_on_with_the_next(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    repo = hub.repos["org/tiny"] = Repo({GGUF: DATA}, cut=(0, 99))
    repo.cut = (50_000, 1)
    find_partial = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "blobs" / f"{etag(GGUF, DATA)}.incomplete"
    find_partial.parent.mkdir(parents=True)
    find_partial.write_bytes(DATA[:120_000])
    with caplog.at_level(logging.INFO, "atlas.hub"):
        assert find_model("org/tiny").read_bytes() == DATA
    assert hub.fetched() == [(GGUF, "bytes=120000-"), (GGUF, "bytes=170000-")]
    assert not find_partial.exists()
    assert "Fetching org/tiny: 1 file, 0 MB" in caplog.text


def test_a_connection_that_breaks_again_and_again(hub: FakeHub) -> None:
    repo = hub.repos["org/tiny"] = Repo({GGUF: DATA}, cut=(0, 99))
    said = refused()
    assert said.startswith(f"{hub.url} cannot be reached")
    assert said.endswith("what has been fetched is kept, and the same command goes on from there")
    repo.cut = (0, 0)
    assert find_model("org/tiny").read_bytes() == DATA


def test_a_killed_process_is_gone_on_from(hub: FakeHub, tmp_path: Path) -> None:
    """Processes of their own, which know the hub, the cache and the token from the environment alone."""
    data = random.Random(1).randbytes(12 << 20)  # the library hands over pieces of 10 MiB
    stall = threading.Event()
    hub.repos["org/tiny"] = Repo({GGUF: data}, cut=(11 << 20, 1), stall=stall, token="secret")
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret"}
    environ["PYTHONPATH"] = str(ROOT)
    code = "import sys; from atlas_jax.hub import find_model; print(find_model(sys.argv[1]))"
    command = [sys.executable, "-c", code, "org/tiny:Q4_K_M"]

    def run(**more: str) -> str:
        return subprocess.run(
            command, env=environ | more, capture_output=True, text=True, timeout=PATIENCE, check=True
        ).stdout.strip()

    partial = tmp_path / "home" / "hub" / "models--org--tiny" / "blobs" / f"{etag(GGUF, data)}.incomplete"
    killed = subprocess.Popen(command, env=environ)
    wait_for(lambda: partial.exists() and partial.stat().st_size >= 10 << 20)
    killed.send_signal(signal.SIGKILL)
    killed.wait(PATIENCE)
    stall.set()
    hub.seen.clear()
    path = run()
    assert Path(path).read_bytes() == data
    assert hub.fetched() == [(GGUF, f"bytes={10 << 20}-")]
    assert run(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9") == path


def test_a_new_commit_is_fetched_and_an_old_one_serves_until_then(hub: FakeHub) -> None:
    repo = hub.repos["org/tiny"] = Repo({GGUF: DATA})
    old = find_model("org/tiny")
    repo.commit, repo.files = "d" * 40, {GGUF: DATA[::-1]}
    repo.announced = {GGUF: 7}
    refused()
    assert find_model("org/tiny", offline=True) == old
    repo.announced = {}
    new = find_model("org/tiny")
    assert (new.read_bytes(), old.read_bytes()) == (DATA[::-1], DATA)
    assert find_model("org/tiny", offline=True) == new


@pytest.mark.parametrize("announced", [len(DATA) - 1, len(DATA) + 1, 7, 10_000_000])
def test_a_size_that_is_a_lie(hub: FakeHub, announced: int) -> None:
    repo = hub.repos["org/tiny"] = Repo({GGUF: DATA}, announced={GGUF: announced})
    said = refused()
    assert f"org/tiny: {GGUF} should have {announced} bytes, but " in said
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    repo.announced = {}
    assert find_model("org/tiny").read_bytes() == DATA


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_bytes_than_announced(hub: FakeHub, name: str) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors": DATA}
    repo = hub.repos["org/tiny"] = Repo(files, damaged={name})
    assert refused() == f"org/tiny: {name} is damaged: its checksum is not the one that was announced; fetch it again"
    repo.damaged = set()
    assert (find_model("org/tiny") / name).read_bytes() == files[name]


def test_a_part_of_something_longer_is_begun_anew(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA})
    partial = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "blobs" / f"{etag(GGUF, DATA)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(DATA + b"more")
    assert find_model("org/tiny").read_bytes() == DATA
    assert hub.fetched() == [(GGUF, None)]


def test_no_such_repository(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "there is no repository org/none, or it is private, and HF_TOKEN must hold an access token"
    assert refused("org/none") == said
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert refused("org/none") == "there is no repository org/none, or HF_TOKEN's account may not read it"


def test_a_gated_one_wants_a_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/gated"] = Repo({GGUF: DATA}, gated=True, token="secret")
    assert refused("org/gated") == (
        "org/gated is gated: its terms must be accepted, and HF_TOKEN must hold a token of an account that has"
    )
    monkeypatch.setenv("HF_TOKEN", "another")
    assert refused("org/gated").endswith("the account of HF_TOKEN has not accepted them")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert find_model("org/gated").read_bytes() == DATA


def test_no_such_quantisation(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA, "tiny-Q8_0.gguf": b"8"})
    assert refused("org/tiny:Q2_K") == "org/tiny has no Q2_K; it has Q4_K_M, Q8_0"
    find_model("org/tiny")
    assert refused("org/tiny:Q8_0", offline=True) == "of what is in the cache, org/tiny has no Q8_0; it has Q4_K_M"


def test_nobody_answers(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA}, status=503)
    assert refused() == f"org/tiny cannot be fetched now: {hub.url} answers with status 503"
    hub.stop()
    assert refused().startswith(f"{hub.url} cannot be reached (")
    assert refused(offline=True).endswith("and nothing is fetched offline")


def test_no_room(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA}, announced={GGUF: 1 << 60})
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 1 << 61)
    assert f"org/tiny: {GGUF} takes 1152921504607 MB, " in refused()
    assert hub.fetched() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_fills_up(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA})
    blobs = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag(GGUF, DATA)}.incomplete").symlink_to("/dev/full")
    assert refused() == f"org/tiny: the disk of {constants.HF_HUB_CACHE} is full; what has been fetched is kept"


def test_a_cache_that_cannot_be_written(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA})
    Path(constants.HF_HUB_CACHE).write_text("a file")
    assert refused().startswith("org/tiny cannot be kept: ")
    assert refused().endswith("Not a directory")


def test_an_answer_that_would_leave_the_cache(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = Repo({GGUF: DATA}, commit="../../evil")
    assert refused() == "org/tiny: the answer names no commit"
    hub.repos["org/tiny"] = Repo({GGUF: DATA})
    monkeypatch.setattr("tests.hub.fake_hub.etag", lambda *_: "../../../evil")
    assert refused() == f"org/tiny: {GGUF} comes without an ETag, so that nothing can be checked"


@pytest.mark.parametrize("arguments", [["serve"], ["eval"]])
def test_a_start_that_fails_says_why_in_its_last_line(hub: FakeHub, tmp_path: Path, arguments: list[str]) -> None:
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "server", *arguments, "-hf", "org/none"]
    if arguments == ["serve"]:
        command += ["--port", "0", "--atlas-memory-path", str(tmp_path / "memory")]
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith(
        "there is no repository org/none, or it is private, and HF_TOKEN must hold an access token"
    )
    assert "Traceback" not in ended.stderr
