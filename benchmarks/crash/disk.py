"""A disk slowed down from outside: the product has no hook for it, so nothing but libc's calls is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("disk.c")
_PROBE = """
import os, sys, time
data, started = bytes(1 << 20), time.monotonic()
with open(sys.argv[1], "wb", buffering=0) as file:
    for _ in range(int(sys.argv[2])):
        file.write(data)
written = time.monotonic()
with open(sys.argv[1], "ab") as file:
    for _ in range(10):
        os.fsync(file.fileno())
print(written - started, (time.monotonic() - written) / 10)
"""


@dataclass(frozen=True)
class SlowDisk:
    """Writes at `megabytes` a second, `sync_ms` for each fsync, rename and removal."""

    library: Path
    megabytes: float
    sync_ms: float

    def environ(self, folder: Path) -> dict[str, str]:
        """What a process needs in its environment for `folder` to lie on this disk."""
        return {
            "LD_PRELOAD": str(self.library),
            "SLOW_DISK_FOLDER": str(folder.resolve()),
            "SLOW_DISK_BYTES": str(self.megabytes * 2**20),
            "SLOW_DISK_SYNC_MICROS": str(self.sync_ms * 1000),
        }

    def measure(self, folder: Path, file: Path, megabytes: int = 1) -> tuple[float, float]:
        """Megabytes a second and milliseconds a sync of a process that writes `file` with `folder` on this disk."""
        command = [sys.executable, "-c", _PROBE, str(file), str(megabytes)]
        shown = subprocess.run(
            command, env=os.environ | self.environ(folder), check=True, capture_output=True, text=True
        ).stdout
        file.unlink()
        seconds, sync = map(float, shown.split())
        return megabytes / seconds, sync * 1000


def build(folder: Path, megabytes: float, sync_ms: float) -> SlowDisk:
    """Compiles the library into `folder` and makes sure that it slows down that folder's files and no others.

    Raises:
      RuntimeError: there is no C compiler, or files are not slowed down as asked.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("a slow disk needs a C compiler")
    library = folder / "slow_disk.so"
    subprocess.run(
        [compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"],
        check=True,
    )
    disk = SlowDisk(library, megabytes, sync_ms)
    inside, outside = folder / "inside", folder / "outside"
    inside.mkdir()
    rate, sync = disk.measure(inside, inside / "probe")
    if rate > 1.1 * megabytes or sync < sync_ms:
        raise RuntimeError(f"the slow disk writes {rate:.1f} MB/s, {sync:.1f} ms a sync")
    if disk.measure(inside, outside, megabytes=4)[0] < 2 * megabytes:
        raise RuntimeError("the slow disk slows down files of other folders")
    inside.rmdir()
    return disk
