"""The memory folder under kills, other processes, races, odd names and a disk that does not let itself be written."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, VICTIM, Target, prose

_SESSIONS = 8


@attack(
    "two servers, one folder",
    does="starts a second server on the folder of a running one",
    holds="the second ends with a message, the first goes on",
    alone=True,
)
def two_servers(scene: Scene) -> None:
    first = scene.start(folder="shared")
    first.plant()
    scene.count()
    try:
        second = scene.start(folder="shared", wait=False)
    except AssertionError as error:  # it ended before it listened
        log = str(error)
    else:
        end = time.monotonic() + 60
        while second.alive and time.monotonic() < end and not _ready(second):
            time.sleep(0.1)
        scene.must(not second.alive, "a second server runs on the same folder")
        log = second.log
        second.kill()
    said = any(word in log.lower() for word in ("in use", "another", "lock", "already"))
    scene.must(said, f"the second says nothing of the first: {log[-150:]!r}")
    scene.must("Traceback" not in log, "a traceback is in the second's log")
    scene.lost += first.lost()
    again = scene.restart(first, kill=True)
    scene.lost += [f"{fault} after a restart" for fault in again.lost(first.planted)]


def _ready(target: Target) -> bool:
    try:
        return target.http.get("/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _at_once(*work: Callable[[], Any]) -> list[Any]:
    out: list[Any] = [None] * len(work)

    def run(number: int) -> None:
        out[number] = work[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def _tokens(target: Target, session: str) -> int:
    return int(target.contexts(ATTACKER)[session]["tokens"])


@attack(
    "saves side by side",
    does="saves all, one and a context at once while turns go on, and kills the server after an answer",
    holds="no session comes back older than a save that was answered",
    alone=True,
)
def saves_race(scene: Scene) -> None:
    target = scene.start()
    names = [f"race{number}" for number in range(_SESSIONS)]
    for turn in range(max(1, scene.times(40) // _SESSIONS)):
        acknowledged: dict[str, int] = {}

        def work(name: str, turn: int = turn, target: Target = target, found: dict[str, int] = acknowledged) -> None:
            target.say(ATTACKER, name, prose(f"{name}-{turn}", 60)).raise_for_status()
            tokens = _tokens(target, name)
            saves: list[dict[str, Any]] = [{"session_id": name}, {"context_id": name, "state": {"turn": turn}}, {}]
            answers = _at_once(
                *(lambda body=body: target.post(ATTACKER, "/v1/atlas/memory/save", body) for body in saves)
            )
            for answer in answers:
                scene.check(answer, "a save beside another")
            if any(answer.status_code == 200 for answer in answers):
                found[name] = tokens

        _at_once(*(lambda name=name: work(name) for name in names))
        scene.count(len(acknowledged))
        target = scene.restart(target, kill=True)
        found = target.contexts(ATTACKER)
        for name, tokens in acknowledged.items():
            now = found[name]["tokens"] if name in found else 0
            if now < tokens:
                scene.lost.append(f"{name} came back with {now} of {tokens} acknowledged tokens")


@attack(
    "deletes beside saves",
    does="deletes sessions while all are being saved, and kills the server",
    holds="none comes back",
    alone=True,
)
def deletes_race(scene: Scene) -> None:
    target = scene.start()
    names = [f"gone{number}" for number in range(max(4, scene.times(20)))]
    for name in names:
        target.say(ATTACKER, name, prose(name, 60)).raise_for_status()
    target.post(ATTACKER, "/v1/atlas/memory/save").raise_for_status()
    done = threading.Event()

    def save() -> None:
        with target.client(ATTACKER) as http:
            while not done.is_set():
                http.post("/v1/atlas/memory/save", json={})

    saver = threading.Thread(target=save)
    saver.start()
    deleted = []
    try:
        for name in names:
            scene.count()
            answer = target.post(ATTACKER, "/v1/atlas/memory/delete", {"context_id": name})
            if scene.must(answer.status_code == 200, f"delete beside a save: {answer.status_code} {answer.text[:80]}"):
                deleted.append(name)
    finally:
        done.set()
        saver.join()
    back = set(target.contexts(ATTACKER)) & set(deleted)
    scene.must(not back, f"{len(back)} of {len(deleted)} deleted sessions came back at once")
    target = scene.restart(target, kill=True)
    back = set(target.contexts(ATTACKER)) & set(deleted)
    scene.must(not back, f"{len(back)} of {len(deleted)} deleted sessions came back after a kill")
    target = scene.restart(target)
    back = set(target.contexts(ATTACKER)) & set(deleted)
    scene.must(not back, f"{len(back)} of {len(deleted)} deleted sessions came back after an end in order")


@attack(
    "SIGHUP",
    does="sends SIGHUP, as a terminal that is closed does",
    holds="the server stops in order, and what was said before is there again",
    alone=True,
)
def hang_up(scene: Scene) -> None:
    target = scene.start()
    target.say(ATTACKER, "hup", prose("hup", 80)).raise_for_status()
    tokens = _tokens(target, "hup")
    scene.count()
    target.process.send_signal(signal.SIGHUP)
    try:
        code = target.process.wait(60)
    except subprocess.TimeoutExpired:
        scene.must(False, "it runs on after SIGHUP")
    else:
        scene.must(code in (0, -signal.SIGHUP), f"exit code {code}: {target.log[-150:]!r}")
    target = scene.restart(target, kill=True)
    found = target.contexts(ATTACKER)
    if found.get("hup", {}).get("tokens", 0) < tokens:
        scene.lost.append("the session is gone or shorter after SIGHUP")


@attack(
    "reserved file names",
    does="saves archives under the names of the folder's own parts",
    holds="a refusal or a file; saving, deleting and loading work afterwards and after a restart",
    alone=True,
)
def reserved(scene: Scene) -> None:
    target = scene.start()
    target.say(ATTACKER, "mine", prose("mine", 60)).raise_for_status()
    target.post(ATTACKER, "/v1/atlas/memory/save", {"session_id": "mine"}).raise_for_status()
    parts = {part for path in target.memory.rglob("*") for part in path.relative_to(target.memory).parts}
    for name in sorted({"sessions", "deleted", "state", "journal", "index", "lock", "tmp", "manifest.json"} | parts):
        scene.count()
        scene.check(target.post(ATTACKER, "/v1/atlas/memory/save", {"filename": name}), f"save as {name[:30]}")
        scene.check(target.post(ATTACKER, "/v1/atlas/memory/load", {"filename": name}), f"load of {name[:30]}")
    for round_number in range(2):
        target.say(ATTACKER, "mine", "go on").raise_for_status()
        for path, body in (("save", {}), ("save", {"session_id": "mine"}), ("load", {"context_id": "mine"})):
            answer = target.post(ATTACKER, f"/v1/atlas/memory/{path}", body)
            scene.must(answer.status_code == 200, f"{path} {body} afterwards: {answer.status_code} {answer.text[:90]}")
        target.say(ATTACKER, "other", "Hello").raise_for_status()
        answer = target.post(ATTACKER, "/v1/atlas/memory/delete", {"context_id": "other"})
        scene.must(answer.status_code == 200, f"delete afterwards: {answer.status_code} {answer.text[:90]}")
        if not round_number:
            target = scene.restart(target)
            scene.must("mine" in target.contexts(ATTACKER), "the session is gone after a restart")


@attack(
    "a memory folder that is a file",
    does="starts the server on a path where a file lies",
    holds="it ends with a message, or says that nothing is kept; no 500",
    alone=True,
)
def not_a_folder(scene: Scene) -> None:
    (scene.folder / "blocked").mkdir()
    (scene.folder / "blocked" / "memory").write_text("a file")
    scene.count()
    try:
        target = scene.start(folder="blocked")
    except AssertionError as error:
        scene.must("Traceback" not in str(error), f"it ends with a traceback: {str(error)[-150:]!r}")
        scene.must("memory" in str(error), "it ends and does not say why")
        return
    with target.client(ATTACKER) as http:
        status = http.get("/v1/atlas/status").json()
    said = status["status"] != "healthy" or not status["data"]["memory_persistence"]
    scene.must(said, "the status is healthy and persistent")
    scene.check(target.say(ATTACKER, "here", "Hello"), "a turn")
    for path, body in (("save", {}), ("save", {"session_id": "here"}), ("delete", {"context_id": "here"})):
        scene.check(target.post(ATTACKER, f"/v1/atlas/memory/{path}", body), path)
    scene.must("Traceback" not in target.log, "a traceback is in the log")


@attack(
    "a memory folder that goes away",
    does="puts a file in the place of the folder while the server runs",
    holds="clear refusals; what was not deleted is listed, what was deleted does not come back",
    alone=True,
)
def folder_gone(scene: Scene) -> None:
    target = scene.start()
    for name in ("stays", "goes"):
        target.say(ATTACKER, name, prose(name, 60)).raise_for_status()
    target.post(ATTACKER, "/v1/atlas/memory/save").raise_for_status()
    away = target.memory.with_name("away")
    target.memory.rename(away)
    target.memory.write_text("a file")
    scene.count(3)
    scene.check(target.post(ATTACKER, "/v1/atlas/memory/save"), "save without a folder")
    answer = target.post(ATTACKER, "/v1/atlas/memory/delete", {"context_id": "goes"})
    scene.check(answer, "delete without a folder")
    listed = "goes" in target.contexts(ATTACKER)
    scene.must(listed != (answer.status_code == 200), f"delete said {answer.status_code}, and listed is {listed}")
    scene.check(target.say(ATTACKER, "stays", "go on"), "a turn without a folder")
    target.memory.unlink()
    away.rename(target.memory)
    scene.must(target.post(ATTACKER, "/v1/atlas/memory/save").status_code == 200, "save fails once the folder is back")
    target = scene.restart(target)
    found = target.contexts(ATTACKER)
    if "stays" not in found:
        scene.lost.append("a session is gone after the folder had been away")
    scene.must(("goes" in found) != (answer.status_code == 200), "a deleted session came back")


@attack(
    "an unwritable cache",
    does="starts the server with a cache folder that cannot be made",
    holds="it runs without a cache, and says so in a line",
    alone=True,
)
def no_cache(scene: Scene) -> None:
    blocked = scene.folder / "cache"
    blocked.write_text("a file")
    scene.count()
    try:
        target = scene.start(environ={"XDG_CACHE_HOME": str(blocked)})
    except AssertionError as error:
        scene.deaths += 1
        scene.faults.append(f"it does not start: {str(error)[-150:]!r}")
        return
    scene.check(target.say(VICTIM, None, "Hello"), "a chat")
    scene.must("Traceback" not in target.log, "a traceback is in the log")


_FITTING_SECONDS = 300.0


@attack(
    "a memory that cannot be fitted",
    does="serves a model that no memory can be fitted to, twice with one cache",
    holds="both starts serve the model, and the status says why it has no memory",
    alone=True,
)
def unfitted(scene: Scene) -> None:
    model = _unfittable_model(scene.folder / "wild.gguf")
    environ = {"XDG_CACHE_HOME": str(scene.folder / "cache")}
    kept = scene.flags
    drop = {"--atlas-adapter"}
    scene.flags = tuple(
        flag for before, flag in zip(("", *kept), kept, strict=False) if flag not in drop and before not in drop
    )
    for start in ("first", "second"):
        scene.count()
        try:
            target = scene.start(model=model, environ=environ, folder=start)
        except (AssertionError, httpx.HTTPError) as error:
            scene.deaths += 1
            scene.faults.append(f"the {start} start ends: {str(error)[-150:]!r}")
            continue
        scene.check(target.say(VICTIM, None, "Hello"), f"a chat after the {start} start")
        with target.client(VICTIM) as http:
            until = time.monotonic() + _FITTING_SECONDS
            while (data := http.get("/v1/atlas/status").json()["data"])["fitting"] and time.monotonic() < until:
                time.sleep(0.5)
        scene.must(data["fitting"] is None, f"a memory is still being fitted {_FITTING_SECONDS:.0f} s after the start")
        said = data["memory_unavailable"]
        scene.must(said, f"the status says nothing of a memory that is not there after the {start} start")
        scene.must("Traceback" not in target.log, f"a traceback is in the log of the {start} start")
        scene.note(f"{start} start: {target.seconds:.0f} s, {said}")
        target.kill()


def _unfittable_model(path: Path) -> Path:
    """A small model whose logits overflow, so that no gate is found for a memory."""
    from tests.tiny_model import Shape, write_model

    shape = Shape(layers=2, context=1024)
    return write_model(path, shape, seed=7, tensors={"output_norm.weight": np.full(shape.embed, 3e38, np.float32)})
