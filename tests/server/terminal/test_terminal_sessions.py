"""`atlas-jax sessions`: a folder looked after without a server, and beside one."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.engine.sessions.folder_store import MemoryFolder
from server.cli import main
from tests.engine.sessions.folders import MODEL, made, put

OTHER = "cd" * 32
DAY = 86_400.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sessions of two owners and two models, of several ages."""
    now, folder = time.time(), tmp_path / "memory"
    put(folder, "notes", last_used=now - 3600, turns=[[9, 8]])
    put(folder, "Ünïcode 名前", last_used=now - 40 * DAY, saved=True)
    put(folder, "old", owner="ada", last_used=now - 50 * DAY)
    put(folder, "other", model=OTHER, last_used=now - 2 * DAY)
    return folder


def run(root: Path, capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> tuple[int, Any, str]:
    """Exit code, JSON and stderr."""
    code = main(["sessions", name, "--memory-path", str(root), "--json", *arguments])
    shown = capsys.readouterr()
    return code, json.loads(shown.out) if shown.out else None, shown.err


def names(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    return [row["session"] for row in run(root, capsys, "list", *arguments)[1]]


def test_a_list_has_the_latest_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(root, capsys) == ["notes", "other", "Ünïcode 名前", "old"]
    assert names(root, capsys, "--owner", "ada") == ["old"]
    assert names(root, capsys, "--model", "cdcd") == ["other"]
    notes = run(root, capsys, "list")[1][0]
    assert (notes["tokens"], notes["turns_in_journal"], notes["save_point"]) == (5, 1, False)
    assert notes["bytes"] > 500
    assert main(["sessions", "list", "--memory-path", str(root)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]  # a pipe gets columns
    assert [line[0] for line in lines] == ["notes", "other", "Ünïcode 名前", "old"]
    assert lines[0][1:4] == ["local", MODEL[:12], "5"]


def test_one_session_is_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = run(root, capsys, "show", "Ünïcode 名前")
    assert (code, found["session"], found["save_point"], found["listing"]["window"]) == (0, "Ünïcode 名前", True, 512)
    assert main(["sessions", "show", "none", "--memory-path", str(root)]) == 1
    assert capsys.readouterr().err == f"atlas-jax sessions: error: there is no session 'none' in {root}\n"
    put(root, "notes", owner="ada")
    assert main(["sessions", "show", "notes", "--memory-path", str(root)]) == 1
    assert "say which with --owner or --model" in capsys.readouterr().err
    assert main(["sessions", "show", "notes", "--owner", "ada", "--memory-path", str(root)]) == 0
    assert "ada" in capsys.readouterr().out


def test_sessions_go_to_a_file_and_into_another_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, there = tmp_path / "some.atlas", tmp_path / "there"
    code, _, said = run(root, capsys, "export", str(file))
    assert (code, file.exists()) == (2, False)
    assert "say which with --owner" in said
    chosen = ("--owner", "local", "--model", MODEL[:4])
    code, done, _ = run(root, capsys, "export", str(file), *chosen)
    assert (code, done["sessions"], done["left_out"]) == (0, 2, [])
    assert run(root, capsys, "export", str(file), *chosen)[0] == 1  # it is there already
    assert run(root, capsys, "export", str(file), "notes", "--force", *chosen)[1]["sessions"] == 1
    assert run(root, capsys, "export", str(file), "--force", *chosen)[0] == 0
    code, done, _ = run(there, capsys, "import", str(file), "--dry-run")
    assert (code, len(done), there.exists()) == (0, 2, False)
    done = run(there, capsys, "import", str(file), "--owner", "bob")[1]
    assert {(one["session"], one["done"]) for one in done} == {("notes", "imported"), ("Ünïcode 名前", "imported")}
    rows = run(there, capsys, "list")[1]
    assert {(row["session"], row["owner"], row["tokens"]) for row in rows} == {
        ("notes", "bob", 5),
        ("Ünïcode 名前", "bob", 3),
    }
    assert run(there, capsys, "verify")[1] == {"sessions": 2, "faults": []}
    again = run(there, capsys, "import", str(file), "notes", "--owner", "bob")[1]
    assert [one["done"] for one in again] == ["as new or newer here"]
    assert [
        one["done"] for one in run(there, capsys, "import", str(file), "notes", "--owner", "bob", "--replace")[1]
    ] == ["imported"]
    assert run(there, capsys, "import", str(file), "nobody")[0] == 1


def test_a_file_that_is_damaged_brings_nothing_in(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, there = tmp_path / "some.atlas", tmp_path / "there"
    run(root, capsys, "export", str(file), "--owner", "local", "--model", MODEL)
    file.write_bytes(file.read_bytes().replace(b"0.k", b"1.k"))
    code, _, said = run(there, capsys, "import", str(file))
    assert (code, there.exists()) == (1, False)
    assert "damaged" in said
    assert run(there, capsys, "import", str(root / "none.atlas"))[2] == (
        f"atlas-jax sessions: error: {root}/none.atlas: No such file or directory\n"
    )


def test_an_export_leaves_out_what_it_cannot_have_and_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(root, "young", owner="bob", generation=0, turns=[[1]])
    put(root, "grown", owner="bob")
    code, done, _ = run(root, capsys, "export", str(tmp_path / "x.atlas"), "--owner", "bob")
    assert (code, done["sessions"]) == (1, 1)
    assert done["left_out"][0][0] == "young"


def test_damage_is_told_and_the_exit_code_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, capsys, "verify")[:2] == (0, {"sessions": 4, "faults": []})
    files = sorted(root.rglob("*.snapshot.atlas"))
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    next(root.rglob("journal")).write_bytes(b"ATLASJRN\x02\0\0\0\xff\xff\xff\xff....")
    code, found, _ = run(root, capsys, "verify")
    assert (code, found["sessions"], len(found["faults"])) == (1, 4, 3)
    assert {fault["path"] for fault in found["faults"]} >= {file.relative_to(root).as_posix() for file in files[:2]}
    assert main(["sessions", "verify", "--memory-path", str(root)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 4
    assert shown[-1] == "4 sessions checked, 3 files are damaged"
    assert main(["sessions", "list", "--memory-path", str(root)]) == 0  # and the rest is listed all the same
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_old_sessions_are_deleted_for_good(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(root, capsys)
    code, done, _ = run(root, capsys, "prune", "--older-than", "30d", "--dry-run")
    assert (code, {one["session"] for one in done}) == (0, {"Ünïcode 名前", "old"})
    assert names(root, capsys) == before
    assert run(root, capsys, "prune", "--older-than", "30d", "--owner", "local", "--yes")[0] == 0
    assert names(root, capsys) == ["notes", "other", "old"]
    run(root, capsys, "prune", "notes", "--yes")
    assert names(root, capsys) == ["other", "old"]
    folder = MemoryFolder(root)  # a server finds the marks, by which no export brings them back
    try:
        assert len(folder.store(MODEL).deletions("local")) == 2
    finally:
        folder.close()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "say what to delete: NAME, --older-than, --owner or --model"),
        (["--older-than", "soon"], 2, "--older-than wants an age such as 90min, 12h, 30d or 8w, got 'soon'"),
        (["nobody", "--yes"], 1, "there is no session 'nobody' in ROOT"),
        (["notes"], 2, "1 sessions, "),
    ],
)
def test_what_is_not_meant_is_not_deleted(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["sessions", "prune", "--memory-path", str(root), *arguments]) == code
    assert capsys.readouterr().err.startswith(f"atlas-jax sessions: error: {said.replace('ROOT', str(root))}")
    assert len(names(root, capsys)) == 4


def test_what_writes_is_refused_while_a_server_has_the_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.atlas"
    server = MemoryFolder(root)
    try:
        assert run(root, capsys, "list")[0] == 0
        assert run(root, capsys, "verify")[0] == 0
        assert run(root, capsys, "export", str(file), "--owner", "ada")[0] == 0
        for arguments in (["prune", "--owner", "ada", "--yes"], ["import", str(file)]):
            assert main(["sessions", arguments[0], "--memory-path", str(root), *arguments[1:]]) == 1
            assert capsys.readouterr().err == (
                f"atlas-jax sessions: error: '{root}' is in use by another server (process {os.getpid()})\n"
            )
    finally:
        server.close()
    assert "old" in names(root, capsys)


def test_thousands_of_sessions_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their folders are copies of one another under other names, which is told as damage: reading is what is asked here."""
    put(tmp_path, "s")
    (folder,) = tmp_path.glob("*/*/sessions/*/*")
    data = next(folder.glob("*.atlas")).read_bytes()
    for number in range(1000):
        copy = folder.with_name(f"{number:064x}")
        copy.mkdir()
        (copy / f"{1000:020d}.snapshot.atlas").write_bytes(data)
    started = time.process_time()
    rows = run(tmp_path, capsys, "list")[1]
    assert len(rows) == 1001
    assert sum(row["problem"] is not None for row in rows) == 1000
    assert time.process_time() - started < 15


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "list", "--memory-path", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"atlas-jax sessions: error: there is no folder {tmp_path}/none\n"
    (tmp_path / "file").write_bytes(made("s"))
    assert main(["sessions", "verify", "--memory-path", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"atlas-jax sessions: error: {tmp_path}/file is not a folder of sessions\n"
