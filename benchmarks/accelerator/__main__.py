"""Checks and measures this library on the accelerator of this machine, in under ten minutes.

    python -m benchmarks.accelerator [--quick] [--model MODEL.gguf] [--parts machine kernels …] [--output DIR]

Parts, each in a process and a time box of its own, so that one that fails, hangs or runs out of memory costs the others
nothing; what a part has found until then counts:

machine     the device, the bandwidth of a copy and the rate of products, beside the device's own figures where they are known
kernels     every kernel, in the form that this device runs, against its definition on the CPU, and the bandwidth of GEMVs
invariants  inside the window with the memory and without, alone and in a batch, read at once and token by token, with drafts
            and without, a session that was saved: equal bits, or how far apart
golden      greedy text against llama.cpp's, where the model is the one of the golden files
speed       prefill, decoding with 1, 16 and 128 streams, with the memory and without, and the share of the bandwidth

Without --model it is the default model if that has been downloaded, else random weights of its sizes. --quick takes a tiny
model and small arrays: it is how the check itself is tested. Writes accelerator.json and accelerator.md; the exit code is 1
where something is wrong. It needs the library with the extra of the device and what the tests need:
`pip install -e '.[serve,dev,cuda]'`, or `tpu` in place of `cuda`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = {"machine": 60, "kernels": 150, "invariants": 130, "golden": 80, "speed": 160}
"""Seconds that each part has, 580 in all."""
_DEFAULT = Path("data/models/SmolLM2-135M-Instruct.Q4_1.gguf")


def run_part(
    name: str, seconds: float, arguments: list[str], module: str = "benchmarks.accelerator.parts"
) -> dict[str, Any]:
    """What a part has found, and how it ended: done, failed or out of time."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.jsonl"
        with (Path(folder) / "log").open("w+b") as log:
            command = [sys.executable, "-m", module, name, "--found", str(found), *arguments]
            child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                code: int | None = child.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            log.seek(0)
            said = log.read().decode(errors="replace")
        lines = found.read_text().splitlines() if found.exists() else []
    results = [json.loads(line) for line in lines]
    ended = "out of time" if code is None else "done" if code == 0 else f"failed with code {code}"
    wrong = code != 0 or any(result.get("ok") is False for result in results)
    part = {"part": name, "ended": ended, "ok": not wrong, "seconds": round(time.monotonic() - started, 1)}
    return part | {"results": results} | ({"log": said[-4000:]} if wrong else {})


def table(parts: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    lines = ["| part | what | found | |", "|---|---|---|---|"]
    for part in parts:
        for result in part["results"]:
            mark = {True: "ok", False: "WRONG"}.get(result.get("ok"), "")  # type: ignore[arg-type]
            lines.append(f"| {part['part']} | {result['what']} | {result['found']} | {mark} |")
        mark = "ok" if part["ok"] else "WRONG"
        lines.append(f"| {part['part']} | all of it | {part['ended']}, {part['seconds']} s | {mark} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and small arrays")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path("build/accelerator"))
    args = parser.parse_args()
    model = args.model or (_DEFAULT if _DEFAULT.exists() and not args.quick else None)
    args.output.mkdir(parents=True, exist_ok=True)
    arguments = ["--quick"] * args.quick + (["--model", str(model)] if model else [])
    arguments += ["--work", str(args.output / "work")]
    parts = []
    for name in args.parts:
        print(f"{name}: at most {PARTS[name]} s", flush=True)
        parts.append(run_part(name, PARTS[name], arguments))
        # after each part: whoever stops this has what there is
        (args.output / "accelerator.json").write_text(json.dumps(parts, indent=1) + "\n")
        (args.output / "accelerator.md").write_text(table(parts))
    print(table(parts))
    for part in parts:
        if "log" in part:
            print(f"--- {part['part']}, the end of what it said\n{part['log']}")
    return 0 if all(part["ok"] for part in parts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
