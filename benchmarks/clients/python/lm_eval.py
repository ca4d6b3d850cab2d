# /// script
# dependencies = ["lm_eval[api]"]
# ///
"""lm_eval, with a task of two questions that lies in a file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from benchmarks.clients.flows import Client, Servers

client = Client("lm_eval")
TASK = """
task: rivers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ['\\n'], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
DOCUMENTS = [
    {"question": "Which of them is a river? It is the", "answer": "Danube"},
    {"question": "The capital of Austria lies at the", "answer": "Danube"},
]


@contextmanager
def tasks() -> Iterator[TaskManager]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rivers.json"
        data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
        (Path(folder) / "rivers.yaml").write_text(TASK.format(data=data))
        yield TaskManager(include_path=folder, include_defaults=False)


def evaluate(model: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    with tasks() as manager:
        found = lm_eval.simple_evaluate(model, arguments, tasks=["rivers"], task_manager=manager, **options)
    assert found is not None
    results: dict[str, Any] = found["results"]["rivers"]
    return results


@client.flow("chat: local-chat-completions")
def chat(servers: Servers) -> None:
    arguments = {"model": "any", "base_url": f"{servers.url}/v1/chat/completions", "num_concurrent": 2}
    found = evaluate("local-chat-completions", arguments, apply_chat_template=True)
    assert 0 <= found["exact_match,none"] <= 1


@client.flow("chat: local-completions, answers")
def answers(servers: Servers) -> None:
    arguments = {"model": "any", "base_url": f"{servers.url}/v1/completions", "tokenizer_backend": "none"}
    arguments |= {"tokenized_requests": False}
    found = evaluate("local-completions", arguments)
    assert 0 <= found["exact_match,none"] <= 1


if __name__ == "__main__":
    client.main()
