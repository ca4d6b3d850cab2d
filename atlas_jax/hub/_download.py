"""Fetching a model's files into the cache of `huggingface_hub`, or finding them there.

The library lists, authenticates, retries and keeps the cache. A blob is fetched here, beside the place where it then lies,
because the library throws away what it has of a file when the process ends (2.4), and compares no checksum.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_token

from atlas_jax.hub._choice import Choice, HubError, Repository, choose
from atlas_jax.progress import ProgressLog

log = logging.getLogger("atlas.hub")
_LIST_SECONDS = 20.0
_BRANCH = constants.DEFAULT_REVISION
_ETAG = re.compile(r"[0-9A-Za-z_-]{1,128}")
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_CHUNK = 4 << 20


class _Unreachable(HubError):
    """Nobody answers, or not now; what the cache has may do."""


def find(repository: Repository, *, offline: bool) -> Path:
    """`find_model` of a name that has been read."""
    if offline or constants.is_offline_mode():
        found = _cached(repository)
        if found is None:
            raise HubError(
                f"{repository.name} is not in the cache, {constants.HF_HUB_CACHE}, and nothing is fetched offline"
            )
        return found
    try:
        commit, sizes = _list(repository.name)
    except _Unreachable as error:
        found = _cached(repository)
        if found is None:
            raise
        log.warning("%s; what the cache has of %s is served", error, repository.name)
        return found
    choice = choose(sizes, repository)
    folder = _storage(repository.name)
    snapshot = folder / "snapshots" / commit
    missing = [name for name in choice.files if not (snapshot / name).exists()]
    if missing:
        _fetch(repository.name, commit, {name: sizes[name] for name in missing}, folder)
    _remember(folder, commit)
    return _opened(snapshot, choice)


def _storage(name: str) -> Path:
    """The folder of a repository in the cache."""
    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _opened(snapshot: Path, choice: Choice) -> Path:
    return snapshot / choice.opened if choice.opened else snapshot


def _cached(repository: Repository) -> Path | None:
    """The model in the cache: of the latest commit that was asked for, else of one that is there whole."""
    folder = _storage(repository.name)
    snapshots = sorted(folder.glob("snapshots/*"), key=lambda one: one.stat().st_mtime, reverse=True)
    try:
        latest = (folder / "refs" / _BRANCH).read_text().strip()
    except (OSError, UnicodeDecodeError):
        latest = ""
    refused: HubError | None = None
    for snapshot in sorted(snapshots, key=lambda one: one.name != latest):
        files = (path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
        try:
            return _opened(snapshot, choose(files, repository))
        except HubError as error:
            refused = refused or HubError(f"of what is in the cache, {error}")
    if refused is not None:
        raise refused
    return None


def _list(name: str) -> tuple[str, dict[str, int | None]]:
    """The latest commit of a repository, and its files with their sizes."""
    with _explained(name):
        info = HfApi(endpoint=constants.ENDPOINT).model_info(name, timeout=_LIST_SECONDS, files_metadata=True)
    if not _SHA1.fullmatch(info.sha or ""):
        raise HubError(f"{name}: the answer names no commit")
    return str(info.sha), {one.rfilename: one.size for one in info.siblings or ()}


def _fetch(name: str, commit: str, sizes: Mapping[str, int | None], folder: Path) -> None:
    """Brings files of a commit into the cache."""
    total = sum(size or 0 for size in sizes.values())
    with _explained(name):
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
    started, fetched = time.monotonic(), _Fetched(name, total)
    log.info("Fetching %s: %d %s, %.0f MB", name, len(sizes), "file" if len(sizes) == 1 else "files", total / 1e6)
    for file in sizes:
        with _explained(name, file):
            url = hf_hub_url(name, file, revision=commit, endpoint=constants.ENDPOINT)
            found = get_hf_file_metadata(url, timeout=_LIST_SECONDS, endpoint=constants.ENDPOINT, retry_on_errors=True)
            size, etag = found.size, found.etag or ""
            if not _ETAG.fullmatch(etag):
                raise HubError(f"{name}: {file} comes without an ETag, so that nothing can be checked")
            # what no plain request may bring, the library brings in its own way
            if size is None or size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder.name / f"{etag}.lock"
                lock.parent.mkdir(parents=True, exist_ok=True)
                with WeakFileLock(lock):
                    _fetch_blob(f"{name}: {file}", url, folder / "blobs" / etag, size, fetched)
            hf_hub_download(name, file, revision=commit, endpoint=constants.ENDPOINT)
            fetched.files += size or 0
    log.info("Fetched %s in %.1f s", name, time.monotonic() - started)


def _fetch_blob(what: str, url: str, blob: Path, size: int | None, fetched: _Fetched) -> None:
    """Brings one blob into the cache, from where an earlier fetch has left off; raises HubError where it is not the one."""
    if blob.exists():
        return
    partial = blob.with_name(f"{blob.name}.incomplete")
    begin = partial.stat().st_size if partial.exists() else 0
    if size is not None and begin > size:
        partial.unlink()
        begin = 0
    free = shutil.disk_usage(blob.parent).free
    if size is not None and free < size - begin:
        raise HubError(f"{what} takes {_mb(size - begin)}, {blob.parent} has room for {_mb(free)}")
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    try:
        with partial.open("ab") as file:
            sink = cast(BinaryIO, _Sink(file, size, fetched))
            http_get(url, sink, resume_size=begin, headers=headers, expected_size=size, tqdm_class=cast(type, _NoBar))
    except HfHubHTTPError as error:
        if error.response.status_code != 416 or not begin:
            raise
        partial.unlink()  # the file is shorter than what is there of it
        return _fetch_blob(what, url, blob, size, fetched)
    except OSError as error:
        if error.errno is not None or size is None or partial.stat().st_size == size:
            raise
        raise _wrong_size(what, partial, size) from error
    if size is not None and partial.stat().st_size != size:
        raise _wrong_size(what, partial, size)
    if not _right(partial, blob.name):
        partial.unlink()
        raise HubError(f"{what} is damaged: its checksum is not the one that was announced; fetch it again")
    partial.replace(blob)


def _wrong_size(what: str, partial: Path, size: int) -> HubError:
    found = partial.stat().st_size
    partial.unlink()
    return HubError(
        f"{what} should have {size} bytes, but {'more than that' if found > size else found} came; fetch it again"
    )


class _Fetched:
    """How many bytes are there of all, told in the log."""

    def __init__(self, name: str, total: int) -> None:
        self.files = 0
        self._total = total
        self._progress = ProgressLog(f"Fetching {name}", log=log)

    def of_file(self, size: int) -> None:
        """So much of the present file is there."""
        if self._total:
            self._progress(f"{self._total / 1e6:.0f} MB", min(1.0, (self.files + size) / self._total))


class _Sink:
    """A file that takes no more than it should, whatever is sent, and tells how much it has."""

    def __init__(self, file: BinaryIO, size: int | None, fetched: _Fetched) -> None:
        self._file, self._size, self._fetched = file, size, fetched
        self.seek, self.tell, self.truncate = file.seek, file.tell, file.truncate

    def write(self, data: bytes) -> int:
        """Appends a chunk; raises OSError without a number at the first byte past the end."""
        written = self._file.write(data)
        end = self._file.tell()
        if self._size is not None and end > self._size:
            self._file.flush()
            raise OSError("more bytes than announced")
        self._fetched.of_file(end)
        return written


class _NoBar:
    """Stands where `http_get` wants a progress bar."""

    def __init__(self, **_: object) -> None: ...

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, _: float | None = 1) -> None:
        """Shows nothing."""


def _right(path: Path, etag: str) -> bool:
    """Whether a file is what its ETag says: SHA-256 of its bytes for large ones, git's SHA-1 of a blob for others."""
    if _SHA256.fullmatch(etag):
        digest = hashlib.sha256()
    elif _SHA1.fullmatch(etag):
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return True
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == etag


def _remember(folder: Path, commit: str) -> None:
    """Notes the commit that has been fetched, which a start offline looks for first."""
    ref = folder / "refs" / _BRANCH
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"{ref.name}.{os.getpid()}")
        new.write_text(commit)
        new.replace(ref)
    except OSError:
        log.debug("The commit of %s could not be noted", folder.name, exc_info=True)  # a cache that is only read


@contextmanager
def _explained(name: str, file: str | None = None) -> Iterator[None]:
    """Turns what the library raises into one line of HubError."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # a client's library of many kinds of error, none of which is a fault here
        raise _explain(name, file, error) from error


def _explain(name: str, file: str | None, error: Exception) -> HubError:
    token = get_token()
    if isinstance(error, GatedRepoError):
        why = (
            "the account of HF_TOKEN has not accepted them"
            if token
            else "HF_TOKEN must hold a token of an account that has"
        )
        return HubError(f"{name} is gated: its terms must be accepted, and {why}")
    if isinstance(error, RepositoryNotFoundError):
        why = "HF_TOKEN's account may not read it" if token else "it is private, and HF_TOKEN must hold an access token"
        return HubError(f"there is no repository {name}, or {why}")
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError(f"{name} has no file {file}")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return HubError(f"{name} cannot be read: the access token (HF_TOKEN) is not valid")
        if status == 403:
            return HubError(f"{name} cannot be read: the access token (HF_TOKEN) does not allow it")
        if status == 429 or status >= 500:
            return _Unreachable(f"{name} cannot be fetched now: {constants.ENDPOINT} answers with status {status}")
        return HubError(f"{name} cannot be fetched: {constants.ENDPOINT} answers with status {status}")
    if isinstance(error, OfflineModeIsEnabled):
        return _Unreachable(f"{name} cannot be fetched offline")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(f"{name}: the disk of {constants.HF_HUB_CACHE} is full; what has been fetched is kept")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return HubError(f"{name} cannot be kept: {error.filename}: {error.strerror}")
    kept = "" if file is None else "; what has been fetched is kept, and the same command goes on from there"
    return _Unreachable(f"{constants.ENDPOINT} cannot be reached ({_line(error)}){kept}")


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
