"""Fits a memory to a GGUF model and writes the adapter file.

    python -m atlas_jax.recall.fit MODEL.gguf (--output ADAPTER | --ship) [--texts FILE ...] [--gate-texts FILE ...]
      [--max-tokens N] [--memory-dim N]

A server does the same by itself the first time it serves a model, with the texts that come with the library. More text,
and text like what the model will read, makes a better fit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from atlas_jax.config import PAGE, ConfigError, MemoryConfig, ModelConfig
from atlas_jax.gguf import ChatTemplate, GGUFError, ModelFile, TemplateError, Tokenizer
from atlas_jax.model.checkpoint import open_model_file
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.params import ModelParams
from atlas_jax.progress import Progress
from atlas_jax.recall import adapter_store
from atlas_jax.recall.calibration import DEFAULT_DIM, Calibration, calibrate, candidates
from atlas_jax.recall.collect_states import WINDOW
from atlas_jax.recall.conversation import PARTS, Conversation, Render, make_conversation
from atlas_jax.recall.probe import make_probe
from atlas_jax.sharding import ONE_DEVICE, MeshLayout

_ROLES = ("system", "user", "assistant", "model")
"""What chat templates call who speaks: it stands before every message and tells nothing of any."""


def fit(
    model: Path,
    texts: list[str],
    max_tokens: int | None = None,
    memory_dim: int = DEFAULT_DIM,
    gate_texts: Sequence[str] = (),
) -> tuple[bytes, dict[str, object]]:
    """Calibrates a memory.

    Args:
      texts: each long enough to leave the window (512 tokens).
      max_tokens: most tokens read of each text; None reads all.
      memory_dim: numbers of a state that keys keep.
      gate_texts: further texts for the gate alone.

    Raises:
      ConfigError: no memory of this model can have this `memory_dim`.

    Returns:
      The adapter file's bytes, and what was measured.
    """
    started = time.monotonic()
    with open_model_file(model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        config = model_config(file)
        params = load_params(file, config, dtype="int8")
        fingerprint, template = file.fingerprint(), chat_template(file)
    memory = candidates(config, memory_dim)
    found = calibrate_with(
        tokenizer, config, params, texts, max_tokens, memory=memory, template=template, gate_texts=gate_texts
    )
    report: dict[str, object] = {
        "model": fingerprint,
        "memory_dim": found.config.components,
        "layers": found.config.layers,
        "hit_rate": [round(rate, 4) for rate in found.hit_rate],
        "found_rate": [round(rate, 4) for rate in found.found_rate],
        "kept_weights": found.config.kept_weights,
        "gate": [round(float(weight), 4) for weight in (*found.adapter.gate, found.adapter.cue[-1])],
        "loss_window": found.loss_window,
        "loss_memory": found.loss_memory,
        "seconds": round(time.monotonic() - started, 1),
    }
    return adapter_store.encode(fingerprint, found.config, found.adapter), report


def chat_template(file: ModelFile) -> ChatTemplate | None:
    """The chat template of a model's file, or None where it has none that can be used."""
    try:
        return ChatTemplate.from_metadata(file.metadata)
    except (TemplateError, GGUFError):
        return None


def calibrate_with(
    tokenizer: Tokenizer,
    config: ModelConfig,
    params: ModelParams,
    texts: list[str],
    max_tokens: int | None = None,
    mesh_layout: MeshLayout = ONE_DEVICE,
    progress: Progress | None = None,
    memory: MemoryConfig | None = None,
    template: ChatTemplate | None = None,
    gate_texts: Sequence[str] = (),
    seconds: float | None = None,
) -> Calibration:
    """Calibrates with texts that are still text; see `calibrate`."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, parse_special=False)

    def whole(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(text, add_special=True, parse_special=False)[:max_tokens] for text in texts]

    probe = make_probe(adapter_store.probe_filler(), encode, between=(WINDOW + 4) * PAGE)
    markup = {*tokenizer.special_tokens.values(), *(token for role in _ROLES for token in encode(role))}
    conversations = _conversations(tokenizer, template, encode)
    rest = memory, progress, mesh_layout, markup, conversations, whole(gate_texts)
    return calibrate(config, params, whole(texts), probe, *rest, seconds=seconds)


def _conversations(
    tokenizer: Tokenizer, template: ChatTemplate | None, encode: Callable[[str], list[int]]
) -> list[Conversation]:
    """Conversations as the model's template writes them; as plain text where it has none, or one that cannot be used."""

    def templated(messages: Sequence[Mapping[str, str]], answer: bool) -> list[int]:
        assert template is not None
        return template.render_tokens(tokenizer, messages, add_generation_prompt=answer)

    def plain(messages: Sequence[Mapping[str, str]], answer: bool) -> list[int]:
        names = {"user": "Question: ", "assistant": "Answer: "}
        parts = [names[message["role"]] + message["content"] + "\n" for message in messages]
        return encode("".join(parts) + ("Answer:" if answer else ""))

    def made(render: Render) -> list[Conversation]:
        filler, between = adapter_store.probe_filler(), (WINDOW + 4) * PAGE
        return [make_conversation(filler, encode, render, between, part) for part in range(PARTS)]

    if template is not None:
        try:
            return made(templated)
        except (TemplateError, ValueError):
            pass  # it takes no such messages, or answers cannot be told from it
    return made(plain)


def main() -> None:
    """Command line; raises SystemExit where no memory can be fitted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="adapter file to write")
    target.add_argument("--ship", action="store_true", help="write it into the library, as the model's shipped adapter")
    parser.add_argument("--texts", type=Path, nargs="+", help="UTF-8 texts (default: those that come with the library)")
    parser.add_argument("--gate-texts", type=Path, nargs="+", default=[], help="further UTF-8 texts for the gate alone")
    parser.add_argument("--max-tokens", type=int, help="most tokens read of each text")
    parser.add_argument(
        "--memory-dim",
        type=int,
        default=DEFAULT_DIM,
        help=f"numbers of a state that keys keep (default: {DEFAULT_DIM})",
    )
    args = parser.parse_args()
    if args.ship and args.memory_dim != DEFAULT_DIM:
        parser.error(f"--ship is for adapters of the default --memory-dim, {DEFAULT_DIM}")
    texts = [path.read_text("utf-8") for path in args.texts] if args.texts else adapter_store.calibration_texts()
    gate_texts = [path.read_text("utf-8") for path in args.gate_texts]
    try:
        data, report = fit(args.model, texts, args.max_tokens, args.memory_dim, gate_texts)
    except (adapter_store.AdapterError, ConfigError) as error:
        raise SystemExit(f"No memory could be fitted to {args.model}: {error}") from error
    output: Path = adapter_store.shipped_path(str(report["model"])) if args.ship else args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(data)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
