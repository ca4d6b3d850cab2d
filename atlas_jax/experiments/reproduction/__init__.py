"""The comparison of the papers, from one command: `python -m atlas_jax.experiments.reproduction`.

Attention, a sliding window and the memories of the literature as language models of equal size on equal tokens of real
text; what each part of ATLAS is worth; recall of pairs; a needle far past the trained length; bytes and speed beside.
Every run is a file, so the command goes on where it stopped.
"""
