"""Sends every operation of the OpenAPI document what schemathesis makes of it, to a server with the fake engine.

`python -m tests.server.fuzz_openapi --examples 500` fails where an answer is a 5xx that is not documented, has a status or a
body that the document does not say, or where a request that the document forbids is taken. What schemathesis writes is
printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, make_settings

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# What a model is not, and a server has not: neither is a fault.
_CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 501, 503, 507]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs schemathesis; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.server.fuzz_openapi", description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="requests for every operation, of each kind")
    parser.add_argument("--quick", action="store_true", help="no systematic cases beside the generated ones")
    parser.add_argument("--program", default=str(Path(sys.executable).with_name("schemathesis")))
    parser.add_argument("rest", nargs="*", help="further arguments of `schemathesis run`, after --")
    given = parser.parse_args(argv)
    config = Path("build") / "schemathesis.toml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(_CONFIG)

    phases = "examples,fuzzing" if given.quick else "examples,coverage,fuzzing"
    live = Live(make_settings(server={"max_answer_tokens": 64, "allowed_hosts": ["*"]}), FakeEngine())
    try:
        command = [
            *(given.program, "--config-file", str(config), "run", f"{live.url}/schema/openapi.json"),
            *("--max-examples", str(given.examples), "--checks", _CHECKS, "--phases", phases),
            *("--exclude-path", "/v1/atlas/metrics/stream", "--seed", "7", "--no-color", "--request-timeout", "60"),
            *("--suppress-health-check", "all", *given.rest),
        ]
        return subprocess.run(command, check=False).returncode
    finally:
        live.stop()


if __name__ == "__main__":
    sys.exit(main())
