"""What the process holds of main memory, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def resident_bytes() -> int:
    """Main memory this process holds, in bytes; 0 where the system does not say."""
    fields = Path("/proc/self/statm").read_text().split() if Path("/proc/self/statm").exists() else ["0", "0"]
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Returns freed memory to the system, where the C library would keep it for later (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
