"""LiteLLM: the same question through four of the server's APIs.

pip install litellm
python examples/clients/litellm_chat.py [URL]
"""

import sys

import litellm

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
for model, base in (
    ("openai/any", f"{url}/v1"),
    ("hosted_vllm/any", f"{url}/v1"),
    ("anthropic/claude-haiku-4-5", url),
    ("ollama_chat/any", url),
):
    answer = litellm.completion(
        model=model,
        api_base=base,
        api_key="none",
        messages=[{"role": "user", "content": "Name a river."}],
        extra_headers={"x-litellm-session-id": "litellm-example"},
    )
    print(f"{model}: {answer.choices[0].message.content}")
