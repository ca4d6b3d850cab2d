"""What llama.cpp computes of a tiny model of every architecture: logits of a short text, as golden files.

    python -m tests.tiny_families FOLDER
    PEER_PYTHON benchmarks/peer/logits_golden.py FOLDER --out tests/golden/peer

writes a NAME.logits.npy for each FOLDER/NAME.gguf: float32 [tokens, vocabulary]; and NAME.lora.npy where FOLDER has a
NAME.lora, those with this LoRA adapter at a scale of 0.75 (`python -m tests.tiny_lora FOLDER` writes some). PEER_PYTHON has
llama-cpp-python; weights and KV cache are float32. (Not quite exact for models with GELU: llama.cpp looks it up in a table of
half-precision values.)
The models are made of a seed by `tests/tiny_families.py`, so they are not kept; `tests/model/test_architectures.py` compares.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from llama_peer import F32, Peer, version

LORA_SCALE = 0.75
CONTEXT = 256
"""Longer than the original context of the models whose rotary factors for long texts are to be used."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(version())
    for path in sorted(args.folder.glob("*.gguf")):
        peer = Peer(path, context=CONTEXT, cache_type=F32)
        text = np.random.default_rng(11).integers(0, peer.vocab_size, 64).tolist()
        for ending, adapter in (("logits", None), ("lora", path.with_suffix(".lora"))):
            if adapter is not None:
                if not adapter.exists():
                    continue
                peer.adapt(adapter, LORA_SCALE)
                peer.clear()
            logits = peer.decode(text, range(len(text)), outputs=[True] * len(text)).copy()  # of what close() frees
            np.save(args.out / f"{path.stem}.{ending}.npy", logits)
            print(path.stem, ending, logits.shape, round(float(logits.std()), 3))
        peer.close()


if __name__ == "__main__":
    main()
