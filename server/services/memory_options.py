"""From the `atlas` object of a request, its session header and the run-time defaults to the engine's `MemoryParams`."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from atlas_jax.config import PAGE
from atlas_jax.engine.api import EngineProtocol, Fitting, InvalidRequest, MemoryParams, SessionKey
from atlas_jax.engine.config import MIN_WINDOW
from atlas_jax.engine.memory_options import MemoryOptions
from server.errors import BadRequest, NotEnabled, Unavailable
from server.schemas.atlas import AtlasDefaults, AtlasOptions
from server.validation import invalid

_EMPTY = AtlasOptions()
_NAME_CHARS = 128
_RETRY_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What one request does with the memory.

    Attributes:
      params: None is the plain model.
      batch_size: sequences that decode at once.
      session_id: the session's name, or None.
      degraded: why a request that asked for a memory runs without one, or None.
    """

    params: MemoryParams | None
    batch_size: int
    session_id: str | None = None
    degraded: str | None = None


def plan_memory(
    atlas: AtlasOptions | None,
    header: str | None,
    *,
    owner: str,
    defaults: AtlasDefaults,
    unavailable: str | None,
    max_window: int,
    memory_dim: int | None,
    fitting: Fitting | None = None,
) -> MemoryPlan:
    """Resolves one request.

    An `atlas` object or a session header asks for the memory; without either the request runs on the plain model.

    Args:
      header: the value of `X-Session-ID`, or None.
      unavailable: why this server has no memory, or None.
      memory_dim: of the memory that is served; None where it has no such dimension.
      fitting: how far the memory is that will be there soon, or None.

    Raises:
      BadRequest: a value out of range, or two different sessions.
      NotEnabled: a session was named and there is no memory that could keep it.
      Unavailable: there will be one soon.
    """
    if atlas is None and header is None:
        return MemoryPlan(params=None, batch_size=defaults.batch_size)
    session_id = _session(atlas, header)
    merged = _merge(atlas or _EMPTY, defaults)
    check_windows(merged, max_window=max_window, prefix="atlas.")
    if atlas is not None:
        check_memory_dim(atlas.memory_dim, served=memory_dim, prefix="atlas.")
    if not merged.enabled:
        return MemoryPlan(params=None, batch_size=merged.batch_size)
    if unavailable is not None:
        if session_id is not None:
            raise no_memory(unavailable, fitting)
        return MemoryPlan(params=None, batch_size=merged.batch_size, degraded=unavailable)
    return MemoryPlan(
        params=MemoryParams(
            session=None if session_id is None else SessionKey(owner, session_id),
            **{name: getattr(merged, name) for name in MemoryOptions.__struct_fields__},
            regenerate=atlas is not None and bool(atlas.regenerate),
            token_gates=atlas is not None and bool(atlas.token_gates),
            given=frozenset(
                name for name in AtlasOptions.__struct_fields__ if getattr(atlas or _EMPTY, name) is not None
            ),
        ),
        batch_size=merged.batch_size,
        session_id=session_id,
    )


def no_memory(unavailable: str, fitting: Fitting | None) -> NotEnabled | Unavailable:
    """The error of a request that needs a memory: it says how far one is that is being fitted."""
    if fitting is None:
        return NotEnabled(unavailable)
    told = f"{unavailable}: {fitting.stage}, {fitting.share:.0%}, for {fitting.seconds:.0f} s by now"
    return Unavailable(told, code="memory_fitting", retry_after=_RETRY_SECONDS)


def check_windows(values: AtlasDefaults, *, max_window: int, prefix: str) -> None:
    """Raises BadRequest where the window, the page and the Omega window do not fit together."""
    if not MIN_WINDOW <= values.window_size <= max_window:
        raise invalid(f"{prefix}window_size", f"value must be between {MIN_WINDOW} and {max_window}")
    for name in ("window_size", "update_frequency"):
        if getattr(values, name) % PAGE:
            raise invalid(f"{prefix}{name}", f"value must be a multiple of {PAGE}")
    if values.omega_window < values.update_frequency:
        raise invalid(
            f"{prefix}omega_window", f"value must be at least the update_frequency, {values.update_frequency}"
        )


def check_with_engine(values: AtlasDefaults, engine: EngineProtocol, *, prefix: str) -> None:
    """Raises BadRequest for defaults that every request with them would be refused for: what fits, the model decides."""
    if not values.enabled or engine.model.memory_unavailable is not None:
        return
    try:
        engine.check_memory(MemoryParams(**{name: getattr(values, name) for name in MemoryOptions.__struct_fields__}))
    except InvalidRequest as error:
        param = f"{prefix}{(error.param or '').removeprefix('atlas.')}"
        raise BadRequest(str(error).replace(f"'{error.param}'", f"'{param}'"), param=param) from None


def check_memory_dim(wanted: int | None, *, served: int | None, prefix: str) -> None:
    """Raises BadRequest for another dimension than that of the memory, which all its sessions share."""
    if wanted is not None and served is not None and wanted != served:
        raise invalid(
            f"{prefix}memory_dim", f"value must be {served}, which this server was started with (--atlas-memory-dim)"
        )


def check_name(name: str, field: str) -> str:
    """The name of a session or context as it is kept; raises BadRequest.

    What is written the same is the same name, however its accents are composed (Unicode's NFC). Names are 1 to 128
    printable characters. Path separators, `.` and `..` are refused although names are never used as file names: a client
    that sends one has mistaken the field.
    """
    name = unicodedata.normalize("NFC", name)
    if not 0 < len(name) <= _NAME_CHARS:
        raise invalid(field, f"must have between 1 and {_NAME_CHARS} characters")
    if not name.isprintable():  # of spaces, only the common one is
        raise invalid(field, "must not contain control characters or uncommon spaces")
    if name in (".", "..") or any(char in name for char in "/\\\uff0e\u2215\u2216\uff0f\uff3c"):
        raise invalid(field, "must not contain path separators")
    if name != name.strip():
        raise invalid(field, "must not begin or end with a space")
    return name


def check_token_gates(atlas: AtlasOptions | None) -> None:
    """Raises BadRequest where gates are asked of an API whose answers have no place for them."""
    if atlas is not None and atlas.token_gates:
        raise invalid("atlas.token_gates", "is for /v1/chat/completions and /v1/completions")


def _session(atlas: AtlasOptions | None, header: str | None) -> str | None:
    named = None if atlas is None or atlas.session_id is None else check_name(atlas.session_id, "atlas.session_id")
    if header is not None:
        header = check_name(header, "X-Session-ID")
        if named is not None and named != header:
            raise BadRequest("atlas.session_id and X-Session-ID name different sessions", param="atlas.session_id")
    return named if named is not None else header


def _merge(given: AtlasOptions, defaults: AtlasDefaults) -> AtlasDefaults:
    if given is _EMPTY:
        return defaults
    values = {name: getattr(given, name) for name in AtlasDefaults.__struct_fields__}
    return AtlasDefaults(
        **{name: getattr(defaults, name) if value is None else value for name, value in values.items()}
    )
