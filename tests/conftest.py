"""What every test has: compiled programs of the run, and in the process of one module; a log level of its own; Ctrl-C."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import jax
import pytest

# a shell's background jobs ignore Ctrl-C, and nohup's a hang-up: so would the servers the tests start, which begin with the
# defaults of whatever has a handler here
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_MOST_MAPPINGS = 20_000
"""One module has been seen to add some thousands."""


def pytest_configure(config: pytest.Config) -> None:
    """Gives all processes of a run one folder of compiled programs, unless it is told one: most are compiled once, then."""
    if _CACHE not in os.environ:
        os.environ[_CACHE] = folder = tempfile.mkdtemp(prefix="atlas-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(_CACHE, None))


@pytest.fixture(scope="module", autouse=True)
def not_too_many_programs() -> Iterator[None]:
    """Lets compiled programs go when there are many: each takes parts of the address space, of which there may be 65 530."""
    yield
    if _mappings() > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def _mappings() -> int:
    """How many parts the address space has; without /proc, where it is not known to be limited, none."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A server that a test runs in this process sets how much is logged."""
    yield
    logging.getLogger("atlas").setLevel(logging.NOTSET)
