"""Stored sessions that have been damaged or made up, at start and through the API."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, headers_of, prose

_A_START = 20
"""Damaged sessions a start; each start costs seconds, whatever is damaged."""

_EXPORTED = 3


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The same file flipped in a bit, cut, grown, or overwritten in part."""
    out = bytearray(data)
    at = rng.randrange(min(len(out), rng.choice((64, 4096, 1 << 40))))
    way = rng.choice(("flip", "flip", "cut", "zero", "number", "grow", "empty"))
    if way == "flip":
        out[at] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del out[at:]
    elif way == "zero":
        out[at : at + 4096] = bytes(min(4096, len(out) - at))
    elif way == "number":
        out[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
    elif way == "grow":
        out += rng.randbytes(1000)
    else:
        out.clear()
    return bytes(out)


@attack(
    "damaged snapshots",
    does="flips, cuts and overwrites files of stored sessions while the server is down",
    holds="it starts, the others are there, the status says what was wrong, and the damaged bytes are kept",
    alone=True,
)
def snapshots(scene: Scene) -> None:
    target = scene.start()
    target.plant()
    victims = set(target.files())
    names = [f"s{number}" for number in range(_A_START)]
    for name in names:
        target.say(ATTACKER, name, prose(name, 120)).raise_for_status()
        target.post(ATTACKER, "/v1/atlas/memory/save", {"session_id": name}).raise_for_status()
    planted = target.planted
    for _ in range(max(1, scene.times(300) // _A_START)):
        target.kill()  # an end in order may write them together; what was saved lies there as it was saved
        originals = {path: path.read_bytes() for path in target.files()}
        chosen = [path for path in originals if path not in victims and path.suffix == ".atlas"]
        if not scene.must(chosen, "no file of a session is in the memory folder"):
            return
        wrong = set()
        for path in chosen:
            changed = damaged(originals[path], scene.rng)
            path.unlink()  # a save point is the same file as the snapshot, and is to be damaged by itself
            path.write_bytes(changed)
            if changed and changed != originals[path]:
                wrong.add(hashlib.sha256(changed).digest())
            scene.count()
        target = scene.start()
        scene.lost += target.lost(planted)
        status = target.http.get("/v1/atlas/status", headers=headers_of(ATTACKER)).json()["data"]
        scene.must(status["set_aside"], f"the status says nothing of {len(wrong)} damaged files")
        scene.must(all(one["reason"] for one in status["set_aside"]), "something was set aside without a reason")
        for name in names:
            loaded = target.post(ATTACKER, "/v1/atlas/memory/load", {"context_id": name})
            scene.check(loaded, f"load of {name}")
            scene.check(target.say(ATTACKER, name, "go on"), f"a turn in {name}")
        scene.must("Traceback" not in target.log, "a traceback is in the log")
        scene.stop(target)
        missing = wrong - {hashlib.sha256(path.read_bytes()).digest() for path in target.files()}
        scene.must(not missing, f"{len(missing)} of {len(wrong)} damaged files were overwritten or deleted")
        shutil.rmtree(target.memory)
        for path, data in originals.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        target = scene.start()


@attack(
    "damaged archives",
    does="loads exported archives that were flipped, cut or overwritten",
    holds="each is loaded or refused with a reason; the sessions that are there stay",
)
def archives(scene: Scene) -> None:
    export, raw = _export(scene, "archived")
    for _ in range(scene.times(340)):
        export.with_name("changed.atlas").write_bytes(damaged(raw, scene.rng))
        _load(scene, "changed.atlas", "a damaged archive")
    export.with_name("changed.atlas").unlink()
    for number in range(_EXPORTED):
        status = scene.target.say(ATTACKER, f"archived-{number}", "go on").status_code
        scene.must(status == 200, f"a session that a damaged archive had a copy of answers {status}")


def _export(scene: Scene, subject: str) -> tuple[Path, bytes]:
    target = scene.target
    for number in range(_EXPORTED):
        target.say(ATTACKER, f"{subject}-{number}", prose(f"{subject}{number}", 120)).raise_for_status()
    target.post(ATTACKER, "/v1/atlas/memory/save", {"filename": "export.atlas"}).raise_for_status()
    (export,) = target.memory.rglob("export.atlas")
    return export, export.read_bytes()


def _load(scene: Scene, name: str, what: str) -> None:
    scene.count()
    try:
        response = scene.target.post(ATTACKER, "/v1/atlas/memory/load", {"filename": name}, timeout=30)
    except httpx.HTTPError as error:
        scene.faults.append(f"{what}: no answer ({type(error).__name__})")
    else:
        scene.check(response, what)


def crafted(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Archives that nobody's export is: names that climb, bombs, lies about sizes and contents."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile:
        members = {"manifest.json": b"{}", "a.atlas": raw}
    manifest = next((name for name in members if name.endswith(".json")), "manifest.json")
    sessions = [name for name in members if name != manifest]
    listed = json.loads(members.get(manifest, b"{}") or b"{}")

    def pack(
        contents: dict[str, bytes], method: int = zipfile.ZIP_STORED, more: list[zipfile.ZipInfo] | None = None
    ) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
            for info in more or []:
                archive.writestr(info, b"/etc/passwd")
        return out.getvalue()

    def lie(change: Callable[[dict[str, object]], object]) -> bytes:
        copy = json.loads(json.dumps(listed))
        for row in copy.get("sessions", []):
            change(row)
        return pack({**members, manifest: json.dumps(copy).encode()})

    link = zipfile.ZipInfo("link.atlas")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    yield "nothing", b""
    yield "an empty zip", pack({})
    yield "not a zip", b"PK\x03\x04" + b"x" * 1000
    yield "no manifest", pack({name: members[name] for name in sessions})
    yield "a manifest alone", pack({manifest: members.get(manifest, b"{}")})
    yield "a manifest that is no JSON", pack({**members, manifest: b"\xff\xfe{"})
    yield "a manifest of another shape", pack({**members, manifest: b'{"sessions": 5, "model": []}'})
    yield "a manifest of brackets", pack({**members, manifest: b"[" * 1_000_000})
    yield "a manifest of a bomb", pack({**members, manifest: b" " * 200_000_000}, zipfile.ZIP_DEFLATED)
    yield "a member of a bomb", pack({**members, sessions[0]: b"\0" * 500_000_000}, zipfile.ZIP_DEFLATED)
    yield "compressed members", pack(members, zipfile.ZIP_DEFLATED)
    yield "LZMA members", pack(members, zipfile.ZIP_LZMA)
    yield "names that climb", pack({f"../../{name}": data for name, data in members.items()} | members)
    yield "names from the root", pack({"/tmp/attack-escaped": b"x", **members})
    yield "a link", pack(members, more=[link])
    yield (
        "members swapped",
        pack(members | dict(zip(sessions, [members[name] for name in sessions[::-1]], strict=True))),
    )
    yield "members of noise", pack(members | {name: random.Random(1).randbytes(1000) for name in sessions})
    yield "members that are missing", pack({manifest: members.get(manifest, b"{}"), "other": b"x"})
    yield "60 000 members", pack(members | {f"{number:064x}.atlas": b"" for number in range(60_000)})
    yield "names with separators", lie(lambda row: row.update(session_id="../../../etc/passwd"))
    yield "a name of a megabyte", lie(lambda row: row.update(session_id="a" * (1 << 20)))
    yield "sizes below nothing", lie(lambda row: row.update(bytes=-1, tokens=-(2**63), created=1e308))
    yield "more tokens than there are", lie(lambda row: row.update(tokens=2**62, bytes=2**62))
    yield "a tail of another archive", raw + pack({manifest: b"{}"})


@attack(
    "crafted archives",
    does="loads archives with climbing names, bombs and lies in them",
    holds="each is loaded or refused with a reason, nothing is written outside, memory stays bounded",
)
def made_up(scene: Scene) -> None:
    export, raw = _export(scene, "crafted")
    outside = sorted(path.name for path in scene.target.folder.iterdir())
    for what, data in crafted(raw):
        export.with_name("made.atlas").write_bytes(data)
        _load(scene, "made.atlas", what)
    export.with_name("made.atlas").unlink()
    scene.must(sorted(path.name for path in scene.target.folder.iterdir()) == outside, "something lies outside")
    scene.must(not Path("/tmp/attack-escaped").exists(), "something was written to /tmp")
    for name, row in scene.target.contexts(ATTACKER).items():
        scene.check(scene.target.say(ATTACKER, name, "go on"), f"a turn in {name[:40]}")
        scene.must(0 <= row["tokens"] < 10**6, f"session {name[:40]} has {row['tokens']} tokens")
