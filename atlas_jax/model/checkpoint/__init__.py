"""Models as Hugging Face ships them: a folder of config.json, tokenizer.json and safetensors, read as a GGUF file is."""

from __future__ import annotations

import os
from pathlib import Path

from atlas_jax.gguf import GGUFFile, ModelFile
from atlas_jax.model.checkpoint._files import CheckpointError
from atlas_jax.model.checkpoint._folder import CheckpointFolder

__all__ = ["CheckpointError", "CheckpointFolder", "open_model_file"]


def open_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Opens a GGUF file, or a folder with config.json and safetensors.

    Raises:
      GGUFError: it is damaged or hostile; CheckpointError of a folder.
      UnsupportedModel: a folder's model is none of those that are computed.
      OSError: a file cannot be opened.
    """
    path = Path(path)
    return CheckpointFolder.open(path) if path.is_dir() else GGUFFile.open(path)
