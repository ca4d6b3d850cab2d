"""Implements `Objects` with obstore (S3, GCS, Azure), which is an extra: imported where a store is opened."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError

from atlas_jax.config import ConfigError
from atlas_jax.engine.sessions.objects import Changed, Listed, Version

_SMALL_SECONDS, _LARGE_SECONDS = 10, 120
"""What one request may take: for a manifest or a listing, and for a snapshot or an export."""
_RETRIES = 3


class Bucket:
    """Implements `Objects` in an obstore store."""

    def __init__(self, once: Any, small: Any | None = None, large: Any | None = None) -> None:
        """Objects of an obstore store.

        Args:
          once: it, trying nothing again: what is written under conditions is tried again where a lost answer is recognised
            (`ObjectSession`).
          small, large: it with patience, for small objects and for large ones.
        """
        self._once, self._small, self._large = once, once if small is None else small, once if large is None else large

    @classmethod
    def open(cls, location: str, endpoint: str | None) -> Bucket:
        """Opens `s3://bucket/prefix`, `gs://…` or `az://…`; credentials are those that obstore finds.

        Raises:
          ConfigError: it is no such location.
        """
        options: dict[str, Any] = {"connect_timeout": timedelta(seconds=5)}
        more: dict[str, Any] = {} if endpoint is None else {"endpoint": endpoint}
        if endpoint is not None and endpoint.startswith("http://"):
            options["allow_http"] = True

        def opened(seconds: int, retries: int) -> Any:
            client: Any = {**options, "timeout": timedelta(seconds=seconds)}
            retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=seconds)}
            return obstore.store.from_url(location, client_options=client, retry_config=retry, **more)

        try:
            return cls(opened(_SMALL_SECONDS, 0), opened(_SMALL_SECONDS, _RETRIES), opened(_LARGE_SECONDS, _RETRIES))
        except (BaseError, ValueError) as error:
            raise ConfigError(f"atlas.session_store: '{location}' cannot be opened: {_said(error)}") from None

    def check(self) -> None:
        """Raises ConfigError where the store cannot be used, or writes whatever the conditions say."""
        name = f"probe/{uuid.uuid4().hex}"
        try:
            version = self.put(name, b"1", None)
            try:
                honoured = self._refuses(name, None)
                self.put(name, b"2", version)
                honoured = honoured and self._refuses(name, version)
            except Changed:
                honoured = False
            self.delete([name])
        except (OSError, Changed) as error:
            raise ConfigError(f"atlas.session_store cannot be used: {error or type(error).__name__}") from None
        if not honoured:
            raise ConfigError(
                "atlas.session_store does not honour conditional writes (If-Match, If-None-Match): several servers would "
                "overwrite each other's sessions"
            )

    def _refuses(self, name: str, version: Version | None) -> bool:
        try:
            self.put(name, b"3", version)
        except Changed:
            return True
        return False

    def get(self, name: str, known: Version | None = None) -> tuple[bytes, Version] | None:
        """An object, or None; see `Objects.get`."""
        options: Any = None if known is None or known.e_tag is None else {"if_none_match": known.e_tag}
        try:
            found = obstore.get(self._small, name, options=options)
            return bytes(found.bytes()), Version.of(found.meta)
        except NotModifiedError:
            return None
        except FileNotFoundError:
            raise FileNotFoundError from None
        except BaseError as error:
            raise _failed(error) from None

    def put(self, name: str, data: bytes, version: Version | None) -> Version:
        """Writes an object under a condition; raises Changed."""
        mode: Any = "create" if version is None else version.condition
        try:
            return Version.of(obstore.put(self._once, name, data, mode=mode, use_multipart=False))
        except (AlreadyExistsError, PreconditionError, NotModifiedError, FileNotFoundError):
            raise Changed from None
        except BaseError as error:
            raise _failed(error) from None

    def get_large(self, name: str) -> bytes:
        """A large object; raises FileNotFoundError."""
        try:
            return bytes(obstore.get(self._large, name).bytes())
        except FileNotFoundError:
            raise FileNotFoundError from None
        except BaseError as error:
            raise _failed(error) from None

    def put_large(self, name: str, data: Any) -> None:
        """Writes a large object, whatever is there."""
        try:
            obstore.put(self._large, name, data)
        except BaseError as error:
            raise _failed(error) from None

    def delete(self, names: Sequence[str]) -> None:
        """Removes objects; those that are not there are no error."""
        for name in names:
            try:
                obstore.delete(self._small, name)
            except FileNotFoundError:
                continue
            except BaseError as error:
                raise _failed(error) from None

    def rename(self, name: str, new: str) -> None:
        """Gives an object another name; raises FileNotFoundError."""
        try:
            obstore.rename(self._large, name, new)
        except FileNotFoundError:
            raise FileNotFoundError from None
        except BaseError as error:
            raise _failed(error) from None

    def find(self, name: str) -> Listed | None:
        """What is said of an object, or None."""
        try:
            return _listed(obstore.head(self._small, name))
        except FileNotFoundError:
            return None
        except BaseError as error:
            raise _failed(error) from None

    def list(self, folder: str) -> Iterator[Listed]:
        """The objects whose names begin with a folder's, which ends with a slash."""
        try:
            for part in obstore.list(self._small, folder, chunk_size=1000):
                yield from map(_listed, part)
        except BaseError as error:
            raise _failed(error) from None

    def folders(self, folder: str) -> Sequence[str]:
        """The names of a folder's folders."""
        try:
            found = obstore.list_with_delimiter(self._small, folder)["common_prefixes"]
        except BaseError as error:
            raise _failed(error) from None
        return [str(name).rstrip("/").rsplit("/", 1)[-1] for name in found]


def _listed(meta: Any) -> Listed:
    return Listed(meta["path"], meta["size"], meta["last_modified"].timestamp(), Version.of(meta))


def _failed(error: BaseError) -> OSError:
    return OSError(0, _said(error))


def _said(error: Exception) -> str:
    """The first line of an obstore error: the rest is a dump of its request."""
    return str(error).partition("\n")[0][:300]
