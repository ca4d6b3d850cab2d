"""Everyday facts in a long message, asked for in a chat: window alone, memory, everything sent without a memory.

    python -m benchmarks.chat_recall MODEL.gguf --texts TEXT TEXT TEXT [--blends 0.1 0.5 0.9] [--draws 3] [--output FILE.md]

A conversation begins with a message of 20 000 characters of a real text, between whose paragraphs six things lie that
people tell: the name of a dog, a birthday, a seat. The last of them ends more than 4 000 characters before the message
does, so that all have left a window of 512 tokens. The model answers "OK", made to with `logit_bias`: a small model goes on
saying what it has said, and what it would say is not the same in every arm. Then each thing is asked for in a message of
its own, by a client that sends the whole conversation, as most do. Every question of a conversation is asked from the same
state (`write: false`), greedily and several times with the sampling of requests that name none.

A fact is found if the answer holds its key, whole words, whatever the case and punctuation; numbers may be written as
words ("seven forty-two" for 7:42, "the fourteenth of March"). An answer that also says something else counts too: the
window alone shows what can be had by guessing.

All arms ask one server, with its defaults but for what an arm names: the window alone is a session whose memory is not
read (`blend_ratio` 0), "everything sent" a plain request, which attends all there is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_jax.evaluation.chat_facts import CONVERSATIONS, Fact, holds, message
from atlas_jax.evaluation.statistics import wilson
from atlas_jax.gguf import GGUFFile, Tokenizer
from benchmarks.server_process import Server

_ANSWER_TOKENS = 48
_NOTES = "## Notes\n"
_MEANINGS = {0.5: ", the default"}
_FIRST_ANSWER = "OK"


@dataclass(frozen=True)
class Arm:
    """One way to ask; `atlas` is the request's object but for the session, None a plain request."""

    name: str
    atlas: dict[str, Any] | None


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    conversation: int
    fact: Fact
    greedy: bool
    text: str

    @property
    def found(self) -> bool:
        """Whether it holds the fact's key."""
        return holds(self.text, self.fact.keys)


def chat(server: Server, messages: list[dict[str, str]], tokens: int, **fields: object) -> dict[str, Any]:
    """A chat completion."""
    answer = server.http.post(
        "/v1/chat/completions", json={"messages": messages, "max_completion_tokens": tokens, **fields}
    )
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def ask(server: Server, arm: Arm, texts: Sequence[str], ok: int, draws: int) -> list[Answer]:
    """All facts of all conversations, each asked for greedily and `draws` times with the server's own sampling.

    Args:
      ok: the token that the first answer consists of.
    """
    out: list[Answer] = []
    for index, (text, facts) in enumerate(zip(texts, CONVERSATIONS, strict=True)):
        atlas = None if arm.atlas is None else arm.atlas | {"session_id": f"{arm.name} {index}"}
        common: dict[str, Any] = {} if atlas is None else {"atlas": atlas}
        begun = [{"role": "user", "content": text}]
        first = chat(server, begun, 1, temperature=0, logit_bias={str(ok): 100}, **common)
        said = first["choices"][0]["message"]["content"]
        assert said == _FIRST_ANSWER, said
        begun.append({"role": "assistant", "content": said})
        if atlas is not None:
            common = {"atlas": atlas | {"write": False}}
        for fact in facts:
            messages = [*begun, {"role": "user", "content": fact.question}]
            for sampling in ({"temperature": 0}, {"seed": 1, "n": draws}):
                body = chat(server, messages, _ANSWER_TOKENS, **sampling, **common)
                if atlas is not None:  # each question finds the session as the first answer left it
                    assert body["atlas_stats"]["history"] == "continued", body["atlas_stats"]
                out += [
                    Answer(index, fact, "temperature" in sampling, choice["message"]["content"])
                    for choice in body["choices"]
                ]
    return out


def table(answers: dict[str, list[Answer]], draws: int) -> str:
    """Facts found by arm, with intervals; several draws of a fact count as one question."""
    facts = sum(map(len, CONVERSATIONS))
    lines = [
        f"| facts found of {facts} (95 % interval of the share) | greedy | default sampling, mean of {draws} draws |",
        "|---|---|---|",
    ]
    for name, given in answers.items():
        greedy = sum(one.found for one in given if one.greedy)
        drawn = sum(one.found for one in given if not one.greedy) / draws
        cells = []
        for figure, found in ((f"{greedy}", greedy), (f"{drawn:.1f}", drawn)):
            share = wilson(found, facts)
            cells.append(f"{figure} ({share.low:.2f} to {share.high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def examples(answers: dict[str, list[Answer]]) -> str:
    """What every arm said greedily."""
    names = list(answers)
    lines = [f"| question | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    rows = zip(*([one for one in answers[name] if one.greedy] for name in names), strict=True)
    for row in rows:
        assert len({one.fact.question for one in row}) == 1, "the arms were asked different questions"
        cells = [f"{'**' if one.found else ''}{_cell(one.text)}{'**' if one.found else ''}" for one in row]
        lines.append(f"| {_cell(row[0].fact.said)} {_cell(row[0].fact.question)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("*", "").replace("`", "'")
    return line if len(line) <= 90 else f"{line[:87]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="texts the facts lie in, in turn")
    parser.add_argument("--blends", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--draws", type=int, default=3, help="how often each question is asked at default sampling")
    parser.add_argument("--adapter", type=Path, help="another memory than the shipped one")
    parser.add_argument("--output", type=Path, help="Markdown file for the result; its notes stay")
    parser.add_argument("--answers", type=Path, help="JSON file for all answers")
    args = parser.parse_args()
    with GGUFFile.open(args.model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    (ok,) = tokenizer.encode(_FIRST_ANSWER, add_special=False, parse_special=False)
    sources = [path.read_text("utf-8") for path in args.texts]
    # a text that is used again begins elsewhere
    texts = [
        message(sources[index % len(sources)], facts, 3 + 10 * (index // len(sources)))
        for index, facts in enumerate(CONVERSATIONS)
    ]
    arms = [Arm("window alone", {"blend_ratio": 0.0})]
    arms += [Arm(f"memory, blend {blend:g}{_MEANINGS.get(blend, '')}", {"blend_ratio": blend}) for blend in args.blends]
    arms.append(Arm("everything sent, no memory", None))
    answers: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as name:
        flags = () if args.adapter is None else ("--atlas-adapter", str(args.adapter))
        server = Server(args.model, Path(name), flags)
        try:
            for arm in arms:
                answers[arm.name] = ask(server, arm, texts, ok, args.draws)
                found = sum(one.found for one in answers[arm.name])
                print(f"{arm.name}: {found} of {len(answers[arm.name])} answers", flush=True)
        finally:
            server.end()
    if args.answers is not None:
        rows = [
            {"arm": arm, "said": one.fact.said, "greedy": one.greedy, "found": one.found, "answer": one.text}
            for arm, given in answers.items()
            for one in given
        ]
        args.answers.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    report = (
        f"{table(answers, args.draws)}\n\nGreedy answers, those that hold the fact in bold:\n\n{examples(answers)}\n"
    )
    print(report)
    if args.output is not None:
        command = f"python -m benchmarks.chat_recall {args.model} --texts {' '.join(path.name for path in args.texts)}"
        document = f"# Everyday facts in a chat\n\n`{command}` (`make chat-recall`):\n\n{report}"
        args.output.write_text(document + _notes(args.output))


def _notes(output: Path) -> str:
    """What people have written under the tables of an earlier run."""
    _, found, notes = output.read_text().partition(_NOTES) if output.exists() else ("", "", "")
    return f"\n{found}{notes}" if found else ""


if __name__ == "__main__":
    main()
