"""What llama.cpp says: greedy continuations, first-token probabilities and perplexity, as golden files.

    PEER_PYTHON benchmarks/peer/generate_golden.py NAME MODEL.gguf MODEL.f32.gguf PERPLEXITY.txt --out tests/golden/peer
    PEER_PYTHON benchmarks/peer/generate_golden.py NAME MODEL.gguf --prompts 8 --parts continuations --out tests/golden/peer

writes NAME.continuations.json and NAME.perplexity.json. PEER_PYTHON has llama-cpp-python. MODEL.f32.gguf comes from
dequantize.py; PERPLEXITY.txt is DIR/perplexity.txt of `python atlas_jax/evaluation/corpora.py --out DIR --group perplexity`.

Every measurement is made twice, or once where there is no MODEL.f32.gguf:
  quantised  the file as it is, KV cache f16: what a user of llama.cpp gets. Its CPU code rounds activations to 8 bits.
  float32    the same weights as float32, KV cache float32, float32 products. Use this one to judge another engine. (Not
             quite exact for Gemma: llama.cpp looks GELU up in a table of half-precision values.)

Continuations: the argmax of the logits, 32 tokens or up to and with an end-of-generation token. `margins` is the lead
of each chosen token over the second, in logits: where it is small, another engine may well choose differently. `top`
has the five most probable tokens at the first generated position with their natural-log probabilities.

Perplexity: the text's ids (no BOS, control tokens not read) are cut into chunks, without overlap and without the
incomplete last one; a chunk is 1024 ids, of which the first is BOS where the model's metadata asks for one. The figure
of a chunk is the mean over positions p = 256..1023 of -ln P(id[p] | id[0..p-1]), from the full logits in float64.
`ids` holds the chunks without their BOS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from llama_peer import F16, F32, Peer, sha256, system_info, version
from numpy.typing import NDArray
from prompts import CONVERSATIONS, TEXTS

CHUNK, SCORED_FROM, STEPS, BLOCK = 1024, 256, 32, 256
CHAT_MODEL_TEXTS = 30
PARTS = ("continuations", "perplexity")

Json = dict[str, Any]


def encode_prompts(peer: Peer) -> list[Json]:
    start = [] if peer.bos is None else [peer.bos]
    try:
        template = peer.metadata("tokenizer.chat_template")
    except KeyError:
        return [{"text": text, "prompt": start + peer.tokenize(text)} for text in TEXTS]
    render = Jinja2ChatFormatter(template=template, eos_token="", bos_token="")
    chats = [
        {"messages": messages, "prompt": start + peer.tokenize(render(messages=messages).prompt, special=True)}
        for messages in CONVERSATIONS
    ]
    return chats + [{"text": text, "prompt": start + peer.tokenize(text)} for text in TEXTS[:CHAT_MODEL_TEXTS]]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def continuation(peer: Peer, prompt: list[int]) -> Json:
    peer.clear()
    logits = peer.prefill(prompt)
    probabilities = log_softmax(logits)
    top = [[int(i), round(float(probabilities[i]), 4)] for i in np.argsort(-probabilities)[:5]]
    tokens: list[int] = []
    margins: list[float] = []
    while True:
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(int(np.argmax(logits)))
        margins.append(round(float(first - second), 3))
        if len(tokens) == STEPS or peer.ends(tokens[-1]):
            return {"tokens": tokens, "margins": margins, "top": top}
        logits = peer.decode([tokens[-1]], [len(prompt) + len(tokens) - 1])[0]


def chunks(peer: Peer, ids: list[int]) -> list[list[int]]:
    start = [] if peer.bos is None else [peer.bos]
    size = CHUNK - len(start)
    return [start + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]


def chunk_nll(peer: Peer, chunk: list[int]) -> float:
    """Mean negative log-likelihood of positions SCORED_FROM.. given all before them; in blocks, to bound memory."""
    peer.clear()
    losses: list[float] = []
    for begin in range(0, CHUNK, BLOCK):
        positions = range(begin, begin + BLOCK)
        scored = [SCORED_FROM <= position + 1 < CHUNK for position in positions]  # a row predicts the next position
        rows = peer.decode(chunk[begin : begin + BLOCK], positions, outputs=scored) if any(scored) else None
        if rows is None:
            peer.decode(chunk[begin : begin + BLOCK], positions)
            continue
        targets = [chunk[position + 1] for position, score in zip(positions, scored, strict=True) if score]
        for row, target in zip(rows, targets, strict=True):
            losses.append(-float(log_softmax(row)[target]))
    assert len(losses) == CHUNK - SCORED_FROM
    return math.fsum(losses) / len(losses)


def measure_continuations(peers: dict[str, Peer], count: int | None) -> list[Json]:
    entries = encode_prompts(peers["quantised"])
    if count is not None:
        chats = [entry for entry in entries if "messages" in entry][: count // 2]
        entries = chats + [entry for entry in entries if "text" in entry][: count - len(chats)]
    for variant, peer in peers.items():
        for entry in entries:
            entry[variant] = continuation(peer, entry["prompt"])
    return entries


def measure_perplexity(peers: dict[str, Peer], text: str) -> tuple[Json, list[list[int]]]:
    """The figures, and the ids that were used."""
    ids, bos = peers["quantised"].tokenize(text), peers["quantised"].bos
    nll: dict[str, list[float]] = {}
    for variant, peer in peers.items():
        nll[variant] = [round(chunk_nll(peer, chunk), 6) for chunk in chunks(peer, ids)]
        print(variant, "perplexity", math.exp(math.fsum(nll[variant]) / len(nll[variant])), flush=True)
    mean = {variant: round(math.fsum(values) / len(values), 6) for variant, values in nll.items()}
    figures = {
        "text": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "made_by": "atlas_jax/evaluation/corpora.py"},
        "protocol": {"chunk": CHUNK, "scored_positions": [SCORED_FROM, CHUNK - 1], "bos": bos},
        "mean_nll": mean,
        "perplexity": {variant: round(math.exp(value), 4) for variant, value in mean.items()},
        "nll": nll,
    }
    size = CHUNK - (bos is not None)
    return figures, [ids[i : i + size] for i in range(0, len(nll["float32"]) * size, size)]


def dump(path: Path, header: Json, **lists: list[Any]) -> None:
    """JSON with one line an entry, so that the files stay small and their diffs readable."""
    pieces = [json.dumps(header, indent=1, ensure_ascii=False)[:-2]]
    for name, entries in lists.items():
        lines = ",\n".join(json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in entries)
        pieces.append(f',\n "{name}": [\n{lines}\n]')
    path.write_text("".join(pieces) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("model", type=Path)
    parser.add_argument("float32", type=Path, nargs="?", help="without it only the file as it is is measured")
    parser.add_argument("text", type=Path, nargs="?", help="of the perplexity")
    parser.add_argument("--prompts", type=int, help="continue so many of the prompts, half of them conversations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    settings = {"n_batch": 2048, "n_ubatch": 512, "flash_attention": False, "quantised_cache": "f16"}
    header: Json = {
        "model": args.name,
        "model_file": args.model.name,
        "model_sha256": sha256(args.model),
        "engine": version(),
        "system_info": system_info(),
        "settings": settings,
    }
    variants = [("quantised", args.model, F16)]
    if args.float32 is not None:
        variants.append(("float32", args.float32, F32))
    peers = {
        variant: Peer(path, context=2 * CHUNK, threads=args.threads, cache_type=cache)
        for variant, path, cache in variants
    }
    args.out.mkdir(parents=True, exist_ok=True)
    if "continuations" in args.parts:
        prompts = measure_continuations(peers, args.prompts)
        dump(args.out / f"{args.name}.continuations.json", header | {"steps": STEPS}, prompts=prompts)
    if "perplexity" in args.parts:
        figures, ids = measure_perplexity(peers, args.text.read_text())
        dump(args.out / f"{args.name}.perplexity.json", header | figures, ids=ids)


if __name__ == "__main__":
    main()
