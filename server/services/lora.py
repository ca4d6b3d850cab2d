"""LoRA adapters as llama.cpp's server has them: numbered, each with a scale, for one request or for all that say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atlas_jax.engine.api import EngineProtocol
from server.schemas.llamacpp import LoraAdapter, LoraChange
from server.schemas.sampling import LoraScale
from server.validation import invalid, parse


def scales_of(given: Sequence[LoraScale] | None, engine: EngineProtocol) -> tuple[float, ...] | None:
    """A scale for each adapter, 0 for those not named; None where nothing is said.

    Raises:
      BadRequest: there is no such adapter, or one is named twice.
    """
    if given is None:
        return None
    count, found = len(engine.lora), dict[int, float]()
    for index, one in enumerate(given):
        if one.id >= count:
            there = f"ids are 0 to {count - 1}" if count else "this server has none"
            raise invalid(f"lora[{index}].id", f"there is no LoRA adapter {one.id}: {there}")
        if one.id in found:
            raise invalid(f"lora[{index}].id", f"LoRA adapter {one.id} is named twice")
        found[one.id] = one.scale
    return tuple(found.get(number, 0.0) for number in range(count))


def adapters(engine: EngineProtocol) -> list[LoraAdapter]:
    """The adapters, with the scales of requests that say nothing."""
    return [
        LoraAdapter(id=number, path=one.name, scale=one.scale, task_name=one.task_name, prompt_prefix=one.prompt_prefix)
        for number, one in enumerate(engine.lora)
    ]


def change(raw: Any, engine: EngineProtocol) -> None:
    """Gives the adapters other scales; raises BadRequest, and then nothing has changed."""
    scales = scales_of(parse(LoraChange, {"lora": raw}).lora, engine)
    assert scales is not None
    engine.scale_lora(scales)
