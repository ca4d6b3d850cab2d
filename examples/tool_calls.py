"""A question the model answers with the help of a function: the call, the function, the result, the answer.

    python examples/tool_calls.py "How many seconds are 3 days?" [--url http://127.0.0.1:8080] [--key KEY]

Small models forget that they may call functions, so the first turn says that one must be called. Needs no package.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from typing import Any

SECONDS = {"minutes": 60, "hours": 3600, "days": 86400}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "to_seconds",
            "description": "Converts a time span to seconds",
            "parameters": {
                "type": "object",
                "properties": {
                    "amount": {"type": "integer", "minimum": 0, "maximum": 100000},
                    "unit": {"enum": list(SECONDS)},
                },
                "required": ["amount", "unit"],
            },
        },
    }
]


def to_seconds(amount: int, unit: str) -> str:
    """What the model may call."""
    return f"{amount * SECONDS[unit]} seconds"


def ask(url: str, key: str, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The assistant's next message."""
    body = {"model": "any", "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 128, **fields}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        message: dict[str, Any] = json.load(answer)["choices"][0]["message"]
    return message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="How many seconds are 3 days?")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", default="none", help="API key, where the server has a keys file")
    args = parser.parse_args()
    messages: list[dict[str, Any]] = [{"role": "user", "content": args.question}]
    try:
        message = ask(args.url, args.key, messages, tool_choice="required", parallel_tool_calls=False)
        messages.append(message)
        for call in message["tool_calls"]:
            result = to_seconds(**json.loads(call["function"]["arguments"]))
            print(f"{call['function']['name']}({call['function']['arguments']}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        print(ask(args.url, args.key, messages, tool_choice="none")["content"])
    except urllib.error.URLError as error:
        sys.exit(f"{args.url}: {error.read().decode() if isinstance(error, urllib.error.HTTPError) else error}")


if __name__ == "__main__":
    main()
