"""How a model's file recommends that its tokens be drawn: the `general.sampling` keys of llama.cpp's converter."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from gguf.constants import Keys

log = logging.getLogger("atlas.engine")
_GENERAL = Keys.General
# Our name, the key, and the least and greatest value that makes sense. What else may be there (mirostat, xtc, the order
# of the samplers) is not implemented.
_KEYS = (
    ("temperature", _GENERAL.SAMPLING_TEMP, 0.0, 100.0),
    ("top_k", _GENERAL.SAMPLING_TOP_K, 0, 1 << 31),
    ("top_p", _GENERAL.SAMPLING_TOP_P, 0.0, 1.0),
    ("min_p", _GENERAL.SAMPLING_MIN_P, 0.0, 1.0),
    ("repeat_penalty", _GENERAL.SAMPLING_PENALTY_REPEAT, 1e-3, 10.0),
)


def recommended_sampling(metadata: Mapping[str, Any]) -> dict[str, float]:
    """The recommended sampling by the names of `SamplingParams`; a value that makes no sense is left out with a warning."""
    found: dict[str, float] = {}
    for name, key, low, high in _KEYS:
        value = metadata.get(key)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if number and low <= value <= high:
            found[name] = int(value) if name == "top_k" else round(float(value), 6)  # stored as float32
        else:
            log.warning("The model's file recommends a senseless %s, which is ignored", key)
    return found
