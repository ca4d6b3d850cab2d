"""The evaluation of a memory: loss by position, recall, harm and cost, each arm beside the others.

`atlas-jax eval MODEL.gguf` runs it. A task is a value (`tasks`), an arm is a request's memory options (`arms`), and what
one arm says to one item of a task is a unit: it is written to `results.jsonl` as soon as it is known, and not measured again.
"""
