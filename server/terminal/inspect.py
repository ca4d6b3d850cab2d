"""`atlas-jax inspect`: what is in a model or a LoRA adapter, and what would be done with it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from server.terminal.arguments import DONE, FAILED, CommandError, Parser, UsageError, run

if TYPE_CHECKING:
    from rich.console import Console

    from atlas_jax.engine.inspection import Inspection, LoraInspection

PROG = "atlas-jax inspect"
_LONG = 100
"""Characters of a metadata value that are shown in a table."""


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog=PROG,
        description="Shows what is in a GGUF file or a folder of safetensors, and what would be done with it: whether it "
        "would be served, in what form its weights would be held, how a session's memory would be divided. No weight is "
        "loaded. The exit code is 1 for a model that would be refused. A LoRA adapter is shown as well.",
    )
    made.add_argument("model", metavar="FILE|FOLDER", type=Path, help="GGUF file, or folder of safetensors")
    made.add_argument("--model", dest="base", metavar="FILE|FOLDER", type=Path, help="model to hold an adapter against")
    made.add_argument("--metadata", action="store_true", help="list the metadata too")
    made.add_argument("--tensors", action="store_true", help="list the tensors too")
    made.add_argument(
        "--fingerprint", action="store_true", help="read even a file of more than 4 GiB for its fingerprint"
    )
    made.add_argument("--memory-budget", type=int, metavar="BYTES", help="as for `serve --atlas-memory-budget`")
    made.add_argument("--json", action="store_true", help="write it all as JSON")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return run(PROG, lambda: _run(parser().parse(argv)))


def _run(args: argparse.Namespace) -> int:
    from atlas_jax.config import ConfigError
    from atlas_jax.engine.config import EngineConfig, default_cache
    from atlas_jax.engine.inspection import inspect_lora, inspect_model, is_lora
    from atlas_jax.gguf import GGUFError
    from atlas_jax.model.families import UnsupportedModel
    from atlas_jax.model.lora_file import LoraError

    logging.getLogger("atlas").setLevel(logging.ERROR)
    try:
        if is_lora(args.model):
            return _lora(inspect_lora(args.model, args.base), args)
        if args.base is not None:
            raise UsageError("--model is for LoRA adapters, and this is none")
        config = EngineConfig(model_path=args.model, memory_budget=args.memory_budget)
        found = inspect_model(args.model, default_cache(), config=config, digest=args.fingerprint)
        tensors = _tensors(args.model) if args.tensors else []
    except ConfigError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{args.model}: {error.strerror}") from None
    except (GGUFError, UnsupportedModel, LoraError) as error:
        raise CommandError(f"{args.model}: {error}") from None
    if args.json:
        _write_json(found, tensors, metadata=args.metadata)
    else:
        _write(found, tensors, metadata=args.metadata)
    return DONE if found.refusal is None else FAILED


def _lora(found: LoraInspection, args: argparse.Namespace) -> int:
    from rich.text import Text

    from server.terminal.output import console, facts, number, safe, size, table

    tensors = _tensors(args.model) if args.tensors else []
    if args.json:
        out: dict[str, Any] = {"kind": "lora", **dataclasses.asdict(found)}
        print(msgspec.json.format(msgspec.json.encode(out), indent=2).decode())
        return DONE if found.refusal is None else FAILED
    screen, (least, most) = console(), found.ranks
    screen.print(Text(safe(found.name, lines=False), style="bold"))
    if found.refusal is not None:
        screen.print(Text(safe(f"would be refused: {found.refusal}", lines=False), style="red"), soft_wrap=True)
    elif args.base is not None:
        screen.print("would be served beside this model", style="green")
    rows = [
        ("file", f"LoRA adapter, GGUF, {size(found.size)}"),
        ("architecture", found.architecture),
        ("size", f"{number(found.parameters)} parameters, in {found.layers} layers"),
        ("rank", f"{most}" if least == most else f"{least} to {most}"),
        ("alpha", f"{found.alpha:g}" if found.alpha else "none: products as they are"),
        ("task", found.task_name),
        ("prompt prefix", found.prompt_prefix),
        ("fingerprint", found.digest),
    ]
    screen.print()
    screen.print(facts((name, value) for name, value in rows if value))
    screen.print()
    weights = [(name, str(count)) for name, count in found.weights.items()]
    screen.print(table([("weights", False), ("adapted", True)], weights))
    _print_tensors(screen, tensors)
    return DONE if found.refusal is None else FAILED


def _tensors(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    from atlas_jax.model.checkpoint import open_model_file

    with open_model_file(path) as file:
        return [(one.name, one.ggml_type.name, tuple(one.shape), one.nbytes) for one in file.tensors.values()]


def _write_json(found: Inspection, tensors: Sequence[tuple[str, str, tuple[int, ...], int]], *, metadata: bool) -> None:
    out: dict[str, Any] = {name: value for name, value in vars(found).items() if name != "metadata"}
    for name in ("tokenizer", "template", "memory"):
        out[name] = None if out[name] is None else dataclasses.asdict(out[name])
    for name in ("types", "weights"):
        out[name] = [dataclasses.asdict(one) for one in out[name]]
    out |= {"served": found.refusal is None, "resident": found.resident}
    if metadata:
        out["metadata"] = {key: _plain(value) for key, value in found.metadata.items()}
    if tensors:
        out["tensor_list"] = [
            {"name": name, "type": kind, "shape": shape, "bytes": size} for name, kind, shape, size in tensors
        ]
    print(msgspec.json.format(msgspec.json.encode(out), indent=2).decode())


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def _write(found: Inspection, tensors: Sequence[tuple[str, str, tuple[int, ...], int]], *, metadata: bool) -> None:
    from rich.text import Text

    from server.terminal.output import console, facts, number, safe, size, table

    out = console()
    out.print(Text(safe(found.name, lines=False), style="bold"))
    if found.refusal is None:
        out.print("would be served", style="green")
    else:
        out.print(Text(safe(f"would be refused: {found.refusal}", lines=False), style="red"), soft_wrap=True)
    out.print()
    out.print(facts(_rows(found)))
    out.print()
    rows = [(one.name, str(one.tensors), number(one.parameters), size(one.bytes)) for one in found.types]
    columns = [("in the file", False), ("tensors", True), ("parameters", True), ("bytes", True)]
    out.print(table(columns, rows))
    if found.weights:
        out.print()
        rows = [(one.name, str(one.tensors), number(one.parameters), size(one.bytes)) for one in found.weights]
        rows.append(("together", "", "", size(found.resident)))
        out.print(table([("in memory", False), ("arrays", True), *columns[2:]], rows))
    if metadata:
        out.print()
        pairs = [(key, _short(_plain(value))) for key, value in found.metadata.items()]
        out.print(table([("metadata", False), ("value", False)], pairs))
    _print_tensors(out, tensors)


def _print_tensors(out: Console, tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> None:
    from server.terminal.output import size, table

    if tensors:
        out.print()
        rows = [(name, kind, "×".join(map(str, shape)), size(count)) for name, kind, shape, count in tensors]
        out.print(table([("tensor", False), ("type", False), ("shape", False), ("bytes", True)], rows))


def _rows(found: Inspection) -> list[tuple[str, str]]:
    from server.terminal.output import number, size

    files = {"gguf": "GGUF", "safetensors": "folder of safetensors"}[found.kind]
    rows = [("file", f"{files}, {size(found.size)}, {found.tensors} tensors")]
    if found.left_out:
        rows.append(("left out", f"{found.left_out} tensors that are no part of the text model"))
    rows.append(("architecture", found.architecture))
    shape = [f"{number(found.parameters)} parameters"]
    if found.layers is not None and found.heads is not None:
        shape += [
            f"{found.layers} layers of {found.embedding_size}",
            f"{found.heads[0]} heads over {found.heads[1]} of keys and values",
        ]
    rows.append(("size", ", ".join(shape)))
    if found.context_length is not None:
        rows.append(("trained context", f"{number(found.context_length)} tokens"))
    tokenizer = found.tokenizer
    words = (
        f"{tokenizer.kind or 'none'}{f' ({tokenizer.pre})' if tokenizer.pre else ''}, {number(tokenizer.tokens)} tokens"
    )
    for name, token in (("first", tokenizer.bos), ("last", tokenizer.eos)):
        words += f", {name} {token}" if token else ""
    rows.append(("tokenizer", words))
    rows.append(("chat template", _template(found)))
    if found.sampling:
        rows.append(("recommended", ", ".join(f"{name} {value:g}" for name, value in found.sampling.items())))
    rows.append(("fingerprint", found.fingerprint or "not computed: the file is large; --fingerprint reads it"))
    if found.own_memory is not None:
        rows.append(("memory", found.own_memory))
    if found.memory is not None:
        memory, state = found.memory, found.memory.state
        adapter = {
            "shipped": "shipped with atlas-jax",
            "cached": "fitted by an earlier start",
            "to be fitted": "fitted at the first start, which takes some minutes",
            "not looked for": "not looked for without a fingerprint",
        }[memory.adapter]
        layers = f", layers {', '.join(map(str, memory.layers[:4]))}{', …' * (len(memory.layers) > 4)}" * bool(
            memory.layers
        )
        rows += [
            ("adapter", f"{adapter}{layers}"),
            ("session", f"{size(state.total)} of a budget of {size(state.budget)}"),
            ("  window", f"{size(state.window)}: {memory.window} tokens attended exactly"),
            ("  kept pairs", f"{size(state.kept)}: {memory.kept_pairs} per KV head, on average per layer"),
            ("  Omega memory", f"{size(state.memory)}: keys of {memory.dim}, {number(memory.features)} features"),
        ]
    return rows


def _template(found: Inspection) -> str:
    template = found.template
    if template.problem is not None:
        return f"cannot be used, so only plain completions: {template.problem}"
    if not template.own:
        return "none; a plain one is used"
    parts = ["a system message" if template.system else "no system message"]
    parts.append("tools" if template.tools else "no tools of its own: they are described in a message")
    if template.thinking is not None:
        parts.append(f"reasoning between {template.thinking[0]} and {template.thinking[1]}")
    if template.channels:
        parts.append("answers in channels")
    return "its own: " + ", ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} values: {str(value[:8])[1:-1]}{', …' if len(value) > 8 else ''}"[: 2 * _LONG]
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= _LONG else f"{text[:_LONG]}… ({len(text)} characters)"
