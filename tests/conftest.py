"""What every test has: programs of one module, a log level of its own, and Ctrl-C."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator

import jax
import pytest

# a shell's background jobs ignore Ctrl-C, and nohup's a hang-up: so would the servers the tests start, which begin with the
# defaults of whatever has a handler here
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """Lets compiled programs go: each takes parts of the address space, of which a process may have 65 530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A server that a test runs in this process sets how much is logged."""
    yield
    logging.getLogger("atlas").setLevel(logging.NOTSET)
