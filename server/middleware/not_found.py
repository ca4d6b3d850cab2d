"""What a request to a path nobody serves is told: what there is instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_GENERATION = "text is generated at POST /v1/chat/completions, POST /v1/responses and POST /v1/completions"
_TEXT_ONLY = f"this server has no images, audio or moderation; {_GENERATION}"
_KEPT = (
    "POST /v1/responses keeps conversations ('previous_response_id' or 'conversation'), and so do named sessions "
    "('atlas.session_id' or the header X-Session-ID)"
)
# Families of other APIs that clients try, the longer ones first: the path's beginning, and what serves instead.
_FAMILIES = (
    (r"/v1/(images|audio|moderations|realtime)", _TEXT_ONLY),
    (r"/(v1/)?(responses|conversations)/.*|/v1/(threads|assistants)", _KEPT),
    (
        r"/v1/messages/batches|/v1/(files|batches|fine_tuning|uploads|vector_stores)",
        f"nothing can be uploaded; {_GENERATION}",
    ),
    (r"/v1/complete|/generate(_stream)?|/v1beta", _GENERATION),
    (r"/api/(create|pull|push|copy|delete|blobs)", "one model is served, and GET /api/tags lists it"),
    (r"/docs|/redoc|/openapi\.json|/swagger", "the API is described at GET /schema/openapi.json"),
)
_RULES = tuple((re.compile(rf"(?:{pattern})(?:/.*)?"), text) for pattern, text in _FAMILIES)
_LONGEST = 128


def advice(path: str, served: Iterable[str]) -> str:
    """The message for an unknown path; nothing of what the client wrote is repeated.

    Args:
      served: the paths there are, of which the nearest is suggested.
    """
    path = path[:_LONGEST].rstrip("/") or "/"
    for pattern, text in _RULES:
        if pattern.fullmatch(path):
            return f"This path is not served: {text}"
    close = difflib.get_close_matches(path, list(served), 1, cutoff=0.75)
    if close:
        return f"No such path; did you mean {close[0]}?"
    return f"No such path: {_GENERATION}, and GET /schema/openapi.json describes everything"
