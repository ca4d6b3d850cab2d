"""API keys: the keys file, and who a request comes from.

The keys file holds one key a line, `key[:owner][:admin]`; blank lines and lines that start with `#` are skipped.

    k3y-of-the-team:research
    k3y-of-the-operator:ops:admin
    another-key

`owner` is whose sessions the key opens (several keys may share one); without it the key is an owner of its own, named
by a digest of the key. `admin` lets the key change the run-time configuration. Without a keys file everyone is the one
owner `local`, with every right.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.errors import Unauthorized

_KEY = re.compile(r"[\x21-\x39\x3b-\x7e]{1,512}")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is calling.

    Attributes:
      owner: whose sessions the caller sees.
      key_id: which key was used, fit for logs and limits; never the key.
      admin: whether the caller may change the server's configuration.
    """

    owner: str
    key_id: str
    admin: bool


LOCAL = Identity(owner="local", key_id="local", admin=True)


class KeyFileError(Exception):
    """A keys file that cannot be used; the message names the line and never the key."""


class KeyRing:
    """The keys the server accepts; an empty ring is the open server of one owner."""

    def __init__(self, keys: Iterable[tuple[str, Identity]] = ()) -> None:
        self._keys = [(_digest(key), identity) for key, identity in keys]

    @classmethod
    def from_file(cls, path: str) -> KeyRing:
        """Reads a keys file; raises KeyFileError, also for a file without a single key."""
        try:
            with Path(path).open("rb") as file:
                raw = file.read(_MAX_FILE_BYTES + 1)
            if len(raw) > _MAX_FILE_BYTES:
                raise KeyFileError("the keys file is larger than 1 MiB")
            lines = raw.decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"the keys file cannot be read: {type(error).__name__}") from None
        keys: dict[str, Identity] = {}
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            key, identity = _entry(text, number)
            if key in keys:
                raise KeyFileError(f"line {number} of the keys file repeats a key")
            keys[key] = identity
        if not keys:
            raise KeyFileError("the keys file has no key")
        return cls(keys.items())

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return not self._keys

    @property
    def single(self) -> bool:
        """Whether there is exactly one key."""
        return len(self._keys) == 1

    @property
    def owners(self) -> tuple[str, ...]:
        """Every owner, once."""
        if self.open:
            return (LOCAL.owner,)
        return tuple(dict.fromkeys(identity.owner for _, identity in self._keys))

    def authenticate(self, headers: Mapping[bytes, bytes]) -> Identity:
        """Who sent these headers; raises Unauthorized. Takes the same time whichever key matches."""
        if self.open:
            return LOCAL
        given = _digest_bytes(_credential(headers))
        found: Identity | None = None
        for digest, identity in self._keys:
            if hmac.compare_digest(digest, given):
                found = identity
        if found is None:
            raise Unauthorized("Invalid API key")
        return found


def _entry(text: str, number: int) -> tuple[str, Identity]:
    key, *rest = text.split(":")
    admin = bool(rest) and rest[-1] == "admin"
    names = rest[:-1] if admin else rest
    if not _KEY.fullmatch(key):
        raise KeyFileError(f"line {number} of the keys file: a key is 1 to 512 visible ASCII characters without ':'")
    if len(names) > 1 or (names and names[0] and not _OWNER.fullmatch(names[0])):
        raise KeyFileError(f"line {number} of the keys file: expected key[:owner][:admin]")
    key_id = "key-" + hashlib.sha256(key.encode()).hexdigest()[:12]
    return key, Identity(owner=names[0] if names and names[0] else key_id, key_id=key_id, admin=admin)


def _credential(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return token
    return headers.get(b"x-api-key") or headers.get(b"api-key") or b""


def _digest(key: str) -> bytes:
    return _digest_bytes(key.encode())


def _digest_bytes(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
