"""A conversation that is remembered: a chat in the terminal, continued under the same name after you come back.

    python examples/chat_session.py NAME [--url http://127.0.0.1:8080] [--key KEY]

Only what you type is sent; the session on the server holds the rest. An empty line ends. Needs no package.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


def stream(url: str, key: str, session: str, text: str) -> Iterator[str]:
    """The answer to one message, piece by piece as it comes."""
    body: dict[str, Any] = {
        "model": "any",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 256,
        "stream": True,
        "atlas": {"session_id": session},
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            event = line.decode().removeprefix("data: ").strip()
            if not event.startswith("{"):  # an empty line, a comment that keeps the connection, or the end
                continue
            found = json.loads(event)
            if "error" in found:
                raise RuntimeError(found["error"]["message"])
            for choice in found.get("choices", ()):
                yield choice.get("delta", {}).get("content") or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the session")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", default="none", help="API key, where the server has a keys file")
    args = parser.parse_args()
    for line in iter(lambda: (print("> ", end="", flush=True), sys.stdin.readline())[1].strip(), ""):
        try:
            for piece in stream(args.url, args.key, args.name, line):
                print(piece, end="", flush=True)
        except (urllib.error.URLError, RuntimeError) as error:
            reason = error.read().decode() if isinstance(error, urllib.error.HTTPError) else str(error)
            sys.exit(f"\n{args.url}: {reason}")
        print()


if __name__ == "__main__":
    main()
