"""Fits a memory to a GGUF model and writes the adapter file.

    python -m atlas_jax.memory.fit MODEL.gguf (--output ADAPTER | --ship) [--texts FILE ...] [--max-tokens N]

A server does the same by itself the first time it serves a model, with the texts that come with the library. More text,
and text like what the model will read, makes a better fit.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from atlas_jax.gguf import GGUFFile, Tokenizer
from atlas_jax.memory import store
from atlas_jax.memory.calibrate import calibrate
from atlas_jax.model.loading import load_params, model_config


def fit(model: Path, texts: list[str], max_tokens: int | None = None) -> tuple[bytes, dict[str, object]]:
    """Calibrates a memory.

    Args:
      texts: each long enough to leave the window (512 tokens).
      max_tokens: most tokens read of each text; None reads all.

    Returns:
      The adapter file's bytes, and what was measured.
    """
    started = time.monotonic()
    with GGUFFile.open(model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        config = model_config(file)
        params = load_params(file, config, dtype="int8")
        fingerprint = file.fingerprint()
    ids = [tokenizer.encode(text, add_special=True, parse_special=False)[:max_tokens] for text in texts]
    found = calibrate(config, params, ids)
    report: dict[str, object] = {
        "model": fingerprint,
        "tokens": sum(map(len, ids)),
        "layers": found.config.layers,
        "hit_rate": [round(rate, 4) for rate in found.hit_rate],
        "gate": [round(float(weight), 4) for weight in found.adapter.gate],
        "loss_window": found.loss_window,
        "loss_memory": found.loss_memory,
        "seconds": round(time.monotonic() - started, 1),
    }
    return store.encode(fingerprint, found.config, found.adapter), report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="adapter file to write")
    target.add_argument("--ship", action="store_true", help="write it into the library, as the model's shipped adapter")
    parser.add_argument("--texts", type=Path, nargs="+", help="UTF-8 texts (default: those that come with the library)")
    parser.add_argument("--max-tokens", type=int, help="most tokens read of each text")
    args = parser.parse_args()
    texts = [path.read_text("utf-8") for path in args.texts] if args.texts else store.calibration_texts()
    data, report = fit(args.model, texts, args.max_tokens)
    output: Path = store.shipped_path(str(report["model"])) if args.ship else args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(data)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
