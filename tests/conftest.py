"""Its place makes `tiny_model` and the references importable from every test: pytest adds this folder to the path."""

from __future__ import annotations

import signal

# a shell's background jobs ignore Ctrl-C, and so would the servers the tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
