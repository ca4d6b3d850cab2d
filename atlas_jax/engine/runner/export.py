"""Writes the decode step as StableHLO for other platforms, from a machine that has none of them.

`python -m atlas_jax.engine.runner.export MODEL --platforms cpu cuda tpu --out DIR` writes `decode-<platform>.jax`, which
`jax.export.deserialize` reads, its StableHLO as `decode-<platform>.mlir.bc`, and `decode.json`: name, shape and type of
every argument and result in order. Weights are arguments, not part of the file. Needs the extra `export`.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from atlas_jax.aot import INLINE, shapes
from atlas_jax.engine.runner.step import StepConfig
from atlas_jax.engine.runner.step_programs import StepPrograms, decode_inputs, weight_shapes
from atlas_jax.kernels import lowering_platform
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.model.checkpoint import open_model_file
from atlas_jax.model.loading import WeightDtype, model_config
from atlas_jax.recall import adapter_store

PLATFORMS = ("cpu", "cuda", "tpu")


@dataclass(frozen=True)
class DecodeStep:
    """`StepPrograms.decode` of one model and batch size as one program over a plain list of arrays.

    Attributes:
      arguments, results: trees of shapes, whose leaves are that list.
    """

    config: StepConfig
    arguments: Any
    results: Any

    @classmethod
    def of(
        cls,
        config: StepConfig,
        *,
        rows: int,
        pages: int,
        weight_dtype: WeightDtype = "int8",
        kv_dtype: KVDtype = "int8",
    ) -> DecodeStep:
        """The step of a batch of `rows` rows with rings of `pages` pages, one token per row, without a logits buffer."""
        *arguments, _ = decode_inputs(config, weight_shapes(config, weight_dtype), rows, pages, kv_dtype)
        with lowering_platform.elsewhere("cpu"):
            results = jax.eval_shape(functools.partial(StepPrograms(config).decode, INLINE), *arguments)
        return cls(config, tuple(arguments), shapes(results))

    def export(self, platform: str) -> jax.export.Exported:
        """Lowers it for a platform (`PLATFORMS`), which need not be here. The states are donated."""
        structure = jax.tree.structure(self.arguments)
        weights = len(jax.tree.leaves(self.arguments[0]))
        states = len(jax.tree.leaves(self.arguments[1:3]))
        with lowering_platform.elsewhere(platform):
            decode = StepPrograms(self.config).decode  # which layers are one program depends on the platform

            def flat(*leaves: jax.Array) -> tuple[jax.Array, ...]:
                return tuple(jax.tree.leaves(decode(INLINE, *jax.tree.unflatten(structure, leaves))))

            program = jax.jit(flat, donate_argnums=tuple(range(weights, weights + states)))
            return jax.export.export(program, platforms=[platform])(*jax.tree.leaves(self.arguments))

    def manifest(self) -> dict[str, list[dict[str, object]]]:
        """Name, shape and type of every argument and result."""
        roots = (("arguments", self.arguments), ("results", self.results))
        return {name: [_entry(path, leaf) for path, leaf in _leaves(tree)] for name, tree in roots}


def write(step: DecodeStep, platforms: Sequence[str], folder: Path) -> list[Path]:
    """Writes the step for each platform, and its manifest; returns the files.

    Raises:
      ImportError: the package `flatbuffers` is missing (extra `export`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "decode.json"]
    files[0].write_text(json.dumps(step.manifest(), indent=1) + "\n")
    for platform in platforms:
        exported = step.export(platform)
        for suffix, data in (("jax", exported.serialize()), ("mlir.bc", exported.mlir_module_serialized)):
            files.append(folder / f"decode-{platform}.{suffix}")
            files[-1].write_bytes(bytes(data))
    return files


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _entry(path: tuple[Any, ...], leaf: Any) -> dict[str, object]:
    return {
        "name": jax.tree_util.keystr(path, simple=True, separator="."),
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file; only its metadata is read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=list(PLATFORMS), help="default: all")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch (default: 8)")
    parser.add_argument("--pages", type=int, default=16, help="pages of 128 tokens in a row's ring (default: 16)")
    parser.add_argument("--adapter", type=Path, help="adapter file (default: the shipped one, else no memory)")
    parser.add_argument("--max-window", type=int, default=2048, help="largest window of a session (default: 2048)")
    args = parser.parse_args()
    with open_model_file(args.model) as file:
        config, fingerprint = model_config(file), file.fingerprint()
    data = args.adapter.read_bytes() if args.adapter is not None else adapter_store.shipped(fingerprint)
    memory = None
    if data is not None:
        memory, _ = adapter_store.decode(data, fingerprint, config, max_window=args.max_window)
    step = DecodeStep.of(StepConfig(config, memory), rows=args.rows, pages=args.pages)
    for path in write(step, args.platforms, args.out):
        print(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
