"""`atlas-jax sessions`: a folder of sessions without a server: list, show, export, import, verify, prune."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from server.terminal.arguments import DONE, FAILED, CommandError, Parser, UsageError, run
from server.terminal.places import state_folder

if TYPE_CHECKING:
    from atlas_jax.engine.sessions.folder_store import MemoryFolder
    from atlas_jax.engine.sessions.offline import StoredSession

PROG = "atlas-jax sessions"
_SHOWN = 100
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)?")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, None: 86_400}


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog=PROG,
        description="Looks after a folder of sessions without a model. What reads works beside a server that uses the "
        "folder; import and prune are refused while there is one.",
    )
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    list_ = _add(commands, "list", "list the sessions, the latest used first")
    list_.add_argument("--all", action="store_true", help=f"all of them at a terminal too, which shows {_SHOWN}")
    show = _add(commands, "show", "all that is known of one session")
    show.add_argument("name", metavar="NAME")
    export = _add(commands, "export", "write sessions of one owner and model to an .atlas file")
    export.add_argument("file", type=Path, metavar="FILE")
    export.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    export.add_argument("--force", action="store_true", help="replace the file if it is there")
    import_ = _add(commands, "import", "bring in what is newer in an .atlas file", model=False)
    import_.add_argument("file", type=Path, metavar="FILE")
    import_.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    import_.add_argument("--replace", action="store_true", help="replace newer sessions as well")
    import_.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    _add(
        commands,
        "verify",
        "check every checksum; the exit code is 1 where something is damaged",
        model=False,
        owner=False,
    )
    prune = _add(commands, "prune", "delete sessions for good")
    prune.add_argument("names", nargs="*", metavar="NAME", help="only these")
    prune.add_argument("--older-than", metavar="AGE", help="those unused for so long: 90min, 12h, 30d, 8w")
    prune.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    return made


def _add(commands: Any, name: str, about: str, *, model: bool = True, owner: bool = True) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    made.add_argument(
        "--memory-path",
        type=Path,
        metavar="FOLDER",
        default=None,
        help="the folder (default: that of `atlas-jax chat`, in the user's state folder)",
    )
    if owner:
        made.add_argument("--owner", metavar="NAME", help="only this owner's; without API keys it is 'local'")
    if model:
        made.add_argument("--model", metavar="FINGERPRINT", help="only of the model whose fingerprint begins so")
    made.add_argument("--json", action="store_true", help="write JSON")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return run(PROG, lambda: _run(parser().parse(argv)))


def _run(args: argparse.Namespace) -> int:
    root = args.memory_path or state_folder() / "sessions"
    if not root.is_dir() and args.command != "import":
        raise CommandError(f"{root} is not a folder of sessions" if root.exists() else f"there is no folder {root}")
    from atlas_jax.engine.api import EngineError
    from server.errors import ServerError

    work = {
        "list": _list,
        "show": _show,
        "export": _export,
        "import": _import,
        "verify": _verify,
        "prune": _prune,
    }
    try:
        return work[args.command](root, args)
    except (EngineError, ServerError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename or root}: {error.strerror}") from None


# --- reading ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Row:
    """One session as it is listed."""

    session: str
    owner: str
    model: str
    tokens: int
    bytes: int
    created: float | None
    last_used: float
    turns_in_journal: int
    save_point: bool
    problem: str | None


def _row(found: StoredSession) -> _Row:
    from atlas_jax.engine.api import SnapshotInvalid
    from atlas_jax.engine.sessions.folder_session import SAVED

    key, problem = found.key, found.problem
    tokens, turns, created = 0, 0, None
    try:
        tokens = found.tokens
        turns = 0 if found.journal is None else len(found.journal.turns)
        if found.head is not None:
            created = found.head.listing.created
        elif found.journal is not None:
            created = found.journal.origin.created
    except (SnapshotInvalid, OSError):
        pass  # the problem says it
    return _Row(
        session=f"({found.place.session[:12]}…)" if key is None else key.session_id,
        owner=f"({found.place.owner[:12]}…)" if key is None else key.owner,
        model=found.fingerprint or found.model,
        tokens=tokens,
        bytes=found.size,
        created=created,
        last_used=found.last_used,
        turns_in_journal=turns,
        save_point=(found.folder / SAVED).is_file(),
        problem=problem,
    )


def _chosen(root: Path, args: argparse.Namespace) -> Iterator[tuple[StoredSession, _Row]]:
    """The sessions that the flags name."""
    from atlas_jax.engine.sessions.offline import sessions

    names = set(getattr(args, "names", ()))
    for found in sessions(root):
        row = _row(found)
        if args.owner not in (None, row.owner) or not row.model.startswith(args.model or ""):
            continue
        if names and row.session not in names:
            continue
        yield found, row


def _list(root: Path, args: argparse.Namespace) -> int:
    rows = sorted((row for _, row in _chosen(root, args)), key=lambda row: -row.last_used)
    if args.json:
        print(msgspec.json.encode(rows).decode())
        return DONE
    from server.terminal.output import age, console, number, safe, size, table

    if not sys.stdout.isatty():
        for row in rows:
            cells = (
                row.session,
                row.owner,
                row.model[:12],
                row.tokens,
                row.bytes,
                f"{row.last_used:.0f}",
                row.problem or "",
            )
            print("\t".join(safe(str(cell), lines=False).replace("\t", " ") for cell in cells))
        return DONE
    out = console()
    if not rows:
        out.print(f"There are no sessions in {root}.")
        return DONE
    shown = rows if args.all else rows[:_SHOWN]
    columns = [
        ("session", False),
        ("owner", False),
        ("model", False),
        ("tokens", True),
        ("bytes", True),
        ("used", True),
    ]
    columns.append(("", False))
    out.print(
        table(
            columns,
            (
                (
                    row.session,
                    row.owner,
                    row.model[:8],
                    number(row.tokens),
                    size(row.bytes),
                    age(row.last_used),
                    _notes(row),
                )
                for row in shown
            ),
        )
    )
    more = f", of which {len(shown)} are shown; --all shows the rest" if len(shown) < len(rows) else ""
    out.print(f"{number(len(rows))} sessions, {size(sum(row.bytes for row in rows))}{more}", style="dim")
    return DONE


def _notes(row: _Row) -> str:
    notes = [f"{row.turns_in_journal} turns in its journal"] * bool(row.turns_in_journal)
    notes += ["save point"] * row.save_point
    return ", ".join(notes) if row.problem is None else f"damaged: {row.problem}"


def _show(root: Path, args: argparse.Namespace) -> int:
    args.names = [args.name]
    found = list(_chosen(root, args))
    if not found:
        raise CommandError(f"there is no session '{args.name}' in {root}")
    if len(found) > 1:
        raise CommandError(f"{len(found)} sessions are called '{args.name}': say which with --owner or --model")
    (stored, row), listing = found[0], None
    if row.problem is None and stored.head is not None:
        listing = stored.head.listing
    if args.json:
        out = dataclasses.asdict(row) | {"folder": str(stored.folder), "listing": listing}
        print(msgspec.json.format(msgspec.json.encode(out), indent=2).decode())
        return DONE
    from server.terminal.output import age, console, facts, moment, number, size

    rows = [
        ("session", row.session),
        ("owner", row.owner),
        ("model", row.model),
        ("text", f"{number(row.tokens)} tokens"),
        ("on disk", f"{size(row.bytes)} in {stored.folder}"),
        *([("begun", moment(row.created))] if row.created is not None else []),
        ("last used", f"{moment(row.last_used)}, {age(row.last_used)} ago"),
    ]
    if listing is not None:
        updated = "" if listing.last_update is None else f", the last {moment(listing.last_update)}"
        rows += [
            ("window", f"{number(min(listing.window_fill, listing.window))} of {number(listing.window)} tokens"),
            (
                "kept pairs",
                f"{number(listing.kept)} of {number(listing.kept_capacity)} per KV head, on average per layer",
            ),
            ("memory", f"{number(listing.absorbed)} tokens in {number(listing.updates)} writes{updated}"),
            ("budget", size(listing.budget)),
        ]
    if listing is not None and listing.has_state:
        rows.append(("state", "a client has stored JSON with it"))
    rows.append(("notes", _notes(row) or "none"))
    console().print(facts(rows))
    return DONE


def _export(root: Path, args: argparse.Namespace) -> int:
    from atlas_jax.engine.api import SnapshotInvalid
    from atlas_jax.engine.sessions import archive, files
    from atlas_jax.engine.sessions.portable import whole_snapshot
    from atlas_jax.engine.sessions.snapshot import Listing

    found = list(_chosen(root, args))
    missing = set(args.names) - {row.session for _, row in found}
    if missing:
        raise CommandError(f"there is no session '{sorted(missing)[0]}' in {root}")
    usable = [(stored, row) for stored, row in found if row.problem is None]
    for what, flag in (("owner", "--owner"), ("model", "--model")):
        values = sorted({getattr(row, what) for _, row in usable})
        if len(values) > 1:
            raise UsageError(
                f"these are sessions of {len(values)} {what}s ({', '.join(values)[:200]}): say which with {flag}"
            )
    if not usable:
        raise CommandError(f"there is no session to export in {root}")
    if args.file.exists() and not args.force:
        raise CommandError(f"{args.file} is there already; --force replaces it")
    left: list[tuple[str, str]] = [(row.session, row.problem) for _, row in found if row.problem is not None]

    def members() -> Iterator[tuple[Listing, bytes]]:
        for stored, row in usable:
            try:
                yield whole_snapshot(stored)
            except (SnapshotInvalid, OSError) as error:
                left.append((row.session, str(error)))

    with files.atomic_file(args.file) as file:
        size_, count = archive.write(file, usable[0][1].model, members())
    if args.json:
        out = {"file": str(args.file), "sessions": count, "bytes": size_, "left_out": [list(one) for one in left]}
        print(msgspec.json.encode(out).decode())
    else:
        from server.terminal.output import number, safe, size

        print(f"{number(count)} sessions, {size(size_)}, in {args.file}")
        for name, why in left:
            print(safe(f"left out: {name}: {why}", lines=False), file=sys.stderr)
    return FAILED if left else DONE


def _verify(root: Path, args: argparse.Namespace) -> int:
    from atlas_jax.engine.sessions.offline import Fault, faults

    found, count = [], 0
    for one in faults(root):
        if isinstance(one, Fault):
            found.append(one)
            if not args.json:
                from server.terminal.output import safe

                whose = "" if one.session is None else f" (session {one.session} of {one.owner})"
                print(safe(f"{one.part} {one.path}{whose}: {one.reason}", lines=False))
        else:
            count += 1
    if args.json:
        print(msgspec.json.encode({"sessions": count, "faults": found}).decode())
    else:
        print(
            f"{count} sessions checked, {len(found)} files are damaged"
            if found
            else f"{count} sessions checked, all well"
        )
    return FAILED if found else DONE


# --- writing ----------------------------------------------------------------------------------------------------------
@contextmanager
def _taken(root: Path) -> Iterator[MemoryFolder]:
    """The folder, which no server can use meanwhile; raises CommandError where one does."""
    from atlas_jax.config import ConfigError
    from atlas_jax.engine.sessions.folder_store import MemoryFolder

    try:
        folder = MemoryFolder(root)
    except ConfigError as error:
        raise CommandError(str(error).removeprefix("atlas.memory_path: ")) from None
    try:
        yield folder
    finally:
        folder.close()


def _import(root: Path, args: argparse.Namespace) -> int:
    from atlas_jax.engine.api import SnapshotInvalid
    from atlas_jax.engine.sessions import archive, snapshot
    from atlas_jax.engine.sessions.offline import LARGEST
    from atlas_jax.engine.sessions.portable import put
    from server.services.memory_options import check_name

    done: list[dict[str, str]] = []
    with args.file.open("rb") as file, archive.opened(file) as reader:
        wanted = [one for one in reader.manifest.sessions if not args.names or one.session_id in args.names]
        missing = set(args.names) - {one.session_id for one in wanted}
        if missing:
            raise CommandError(f"there is no session '{sorted(missing)[0]}' in {args.file}")
        for listing in wanted:  # every one is checked before any is brought in
            head, _, _ = snapshot.decode(reader.read(listing.session_id, LARGEST))
            if head.listing.session_id != listing.session_id or head.bound.get("model") != reader.manifest.model:
                raise SnapshotInvalid("archive is damaged: a member belongs to another session")
            check_name(listing.session_id, "session_id")
        if args.dry_run:
            done = [
                {"session": one.session_id, "owner": args.owner or one.owner, "done": "would be read"} for one in wanted
            ]
        else:
            with _taken(root) as folder:
                store = folder.store(reader.manifest.model)
                for listing in wanted:
                    owner = args.owner or listing.owner
                    new = put(store, owner, reader.read(listing.session_id, LARGEST), replace=args.replace)
                    done.append(
                        {
                            "session": listing.session_id,
                            "owner": owner,
                            "done": "imported" if new else "as new or newer here",
                        }
                    )
    return _told(done, args)


def _prune(root: Path, args: argparse.Namespace) -> int:
    if not (args.names or args.older_than or args.owner or args.model):
        raise UsageError("say what to delete: NAME, --older-than, --owner or --model")
    limit = None if args.older_than is None else time.time() - _seconds(args.older_than)

    def old(row: _Row) -> bool:
        return limit is None or row.last_used < limit

    chosen = [(stored, row) for stored, row in _chosen(root, args) if old(row)]
    missing = set(args.names) - {row.session for _, row in chosen}
    if missing and limit is None:
        raise CommandError(f"there is no session '{sorted(missing)[0]}' in {root}")
    if not args.dry_run and chosen and not args.yes:
        _ask(chosen, args)
    done = []
    if args.dry_run:
        done = [{"session": row.session, "owner": row.owner, "done": "would be deleted"} for _, row in chosen]
    else:
        from atlas_jax.engine.sessions.folder_session import FolderSession

        with _taken(root):
            for stored, row in chosen:
                if not old(_row(dataclasses.replace(stored))):  # used while we asked
                    continue
                place = FolderSession(stored.place, stored.folder)
                place.delete(max(time.time_ns() // 1000, place.generation + 1))
                done.append({"session": row.session, "owner": row.owner, "done": "deleted"})
    if not args.json:
        from server.terminal.output import size

        print(
            f"{len(done)} sessions{' would be' * args.dry_run}, {size(sum(row.bytes for _, row in chosen))}",
            file=sys.stderr,
        )
    return _told(done, args)


def _ask(chosen: Sequence[tuple[StoredSession, _Row]], args: argparse.Namespace) -> None:
    from server.terminal.output import size

    what = f"{len(chosen)} sessions, {size(sum(row.bytes for _, row in chosen))}"
    if not sys.stdin.isatty():
        raise UsageError(f"{what} would be deleted for good: --yes says that they shall be")
    if input(f"Delete {what}, for good? [y/N] ").strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was deleted")


def _told(done: Sequence[dict[str, str]], args: argparse.Namespace) -> int:
    from server.terminal.output import safe

    if args.json:
        print(msgspec.json.encode(done).decode())
    else:
        for one in done:
            print(safe(f"{one['session']} ({one['owner']}): {one['done']}", lines=False))
    return DONE


def _seconds(text: str) -> float:
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--older-than wants an age such as 90min, 12h, 30d or 8w, got '{text}'")
    return float(found[1]) * _SECONDS[found[2]]
