"""What sessions need of an object store: objects that are read where they have changed, and written where they have not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Changed(Exception):
    """What was written under a condition is not there any more as it was known, or is there although it was not to be."""


@dataclass(frozen=True)
class Version:
    """One version of an object: its ETag, and what GCS and Azure tell beside it."""

    e_tag: str | None
    number: str | None = None

    @classmethod
    def of(cls, meta: Any) -> Version:
        """The version in what obstore says of an object."""
        return cls(meta.get("e_tag"), meta.get("version"))

    @property
    def condition(self) -> Any:
        """As obstore's mode of a put."""
        return {name: value for name, value in (("e_tag", self.e_tag), ("version", self.number)) if value is not None}


@dataclass(frozen=True)
class Listed:
    """An object in a listing."""

    name: str
    size: int
    modified: float
    version: Version


class Objects(Protocol):
    """The objects of a bucket under a prefix; thread-safe. Every method is one request, but for listings of over a thousand.

    All raise OSError where the store cannot be reached or refuses, with a message that names no credentials; whether a write
    that raised it was taken is not known.
    """

    def check(self) -> None:
        """Raises ConfigError where the store cannot be used, or writes whatever the conditions say."""

    def get(self, name: str, known: Version | None = None) -> tuple[bytes, Version] | None:
        """An object; None where it is still the version that is known.

        Raises:
          FileNotFoundError: there is none.
        """

    def put(self, name: str, data: bytes, version: Version | None) -> Version:
        """Writes an object in the place of a version, or where there is none.

        Raises:
          Changed: another is there, or none any more; nothing was written.
        """

    def get_large(self, name: str) -> bytes:
        """A large object; raises FileNotFoundError."""

    def put_large(self, name: str, data: Any) -> None:
        """Writes a large object, bytes or a file, whatever is there."""

    def delete(self, names: Sequence[str]) -> None:
        """Removes objects; those that are not there are no error."""

    def rename(self, name: str, new: str) -> None:
        """Gives an object another name; raises FileNotFoundError."""

    def find(self, name: str) -> Listed | None:
        """What is said of an object, or None."""

    def list(self, folder: str) -> Iterator[Listed]:
        """The objects whose names begin with a folder's, which ends with a slash."""

    def folders(self, folder: str) -> Sequence[str]:
        """The names of a folder's folders."""
