"""GGUF files: bounded reading, writing, weights, tokenizers and chat templates; NumPy only."""

from __future__ import annotations

from atlas_jax.gguf._budget import TemplateError
from atlas_jax.gguf._chat import FALLBACK_TEMPLATE, ChatTemplate
from atlas_jax.gguf._header import GGUFError, TensorInfo
from atlas_jax.gguf._infill import infill_tokens
from atlas_jax.gguf._metadata import get, require
from atlas_jax.gguf._model_file import ModelFile
from atlas_jax.gguf._nibbles import Floats4, Levels4, Nibbles
from atlas_jax.gguf._reader import GGUFFile
from atlas_jax.gguf._recommended import recommended_sampling
from atlas_jax.gguf._tokenizer import StreamDecoder, Tokenizer
from atlas_jax.gguf._types import TensorType
from atlas_jax.gguf._writer import BYTE_VOCAB, byte_vocabulary, write_gguf

__all__ = [
    "BYTE_VOCAB",
    "FALLBACK_TEMPLATE",
    "ChatTemplate",
    "Floats4",
    "GGUFError",
    "GGUFFile",
    "Levels4",
    "ModelFile",
    "Nibbles",
    "StreamDecoder",
    "TemplateError",
    "TensorInfo",
    "TensorType",
    "Tokenizer",
    "byte_vocabulary",
    "get",
    "infill_tokens",
    "recommended_sampling",
    "require",
    "write_gguf",
]
