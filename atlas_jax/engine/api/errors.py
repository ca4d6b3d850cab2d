"""Every error the engine reports to a caller."""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error the engine reports to a caller; `str(error)` is fit for a client to read."""


class InvalidRequest(EngineError):
    """A request that can never succeed.

    Attributes:
      param: the request field at fault, as a client wrote it (`"prompt"`, `"atlas.window_size"`), or None.
      code: short machine-readable reason, e.g. `"context_length_exceeded"`, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(EngineError):
    """No room now (queue full, contexts exhausted, draining); the same request may succeed later.

    Attributes:
      retry_after: seconds a client should wait.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class MemoryUnavailable(Overloaded):
    """No memory context is free, or a session's memory cannot be read now; the plain model would still answer."""


class SessionNotFound(EngineError):
    """No such session, context or snapshot for this owner."""


class SessionExists(EngineError):
    """A session of that name is there already, and stays as it is."""


class SessionConflict(EngineError):
    """Another server has changed the session meanwhile: nothing was kept, and the same request may be sent again.

    Attributes:
      retry_after: seconds a client should wait.
    """

    retry_after = 0.5


class SnapshotInvalid(EngineError):
    """A snapshot that is damaged, or was made by another model, tokenizer or memory shape."""


class StorageFull(EngineError):
    """The disk or the owner's quota has no room; nothing was changed.

    Attributes:
      retry_after: seconds after which it may be otherwise.
    """

    retry_after = 30.0
