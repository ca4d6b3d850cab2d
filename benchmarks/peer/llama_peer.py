"""llama.cpp, our peer, through the low-level API of llama-cpp-python: load a GGUF, decode batches, read the logits.

Shared by generate_golden.py and speed.py, which run under a Python that has llama-cpp-python and numpy. The project
itself never depends on it.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as lib
from numpy.typing import NDArray

F32, F16 = lib.GGML_TYPE_F32, lib.GGML_TYPE_F16


@lib.llama_log_callback
def _silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


lib.llama_log_set(_silent, ctypes.c_void_p(0))
lib.llama_backend_init()


def version() -> str:
    return f"llama-cpp-python {llama_cpp.__version__}"


def system_info() -> str:
    """The instruction sets this llama.cpp was built with: two builds can differ threefold in speed."""
    return lib.llama_print_system_info().decode().strip(" |")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Peer:
    """One model and one context. A batch is three equal-length lists: token, position, sequence."""

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        sequences: int = 1,
        threads: int = 2,
        batch: int = 2048,
        flash_attention: bool = False,
        cache_type: int = F16,
        extra_buffers: bool = True,
    ) -> None:
        model_params = lib.llama_model_default_params()
        model_params.use_extra_bufts = extra_buffers
        self.model = lib.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise SystemExit(f"cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context * sequences, sequences
        params.n_batch, params.n_ubatch = batch, min(batch, 512)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash_attention)
        params.type_k = params.type_v = cache_type
        params.swa_full = False  # as llama-server does: a sliding-window layer keeps only its window
        params.kv_unified = False
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"cannot make a context of {context} x {sequences} for {path}")
        self.memory = lib.llama_get_memory(self.context)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.vocab_size = lib.llama_vocab_n_tokens(self.vocab)
        self.batch_size = batch
        self._batch = lib.llama_batch_init(batch, 0, 1)

    def close(self) -> None:
        lib.llama_batch_free(self._batch)
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)

    def adapt(self, path: Path, scale: float) -> None:
        """Has the context use a LoRA adapter."""
        adapter = lib.llama_adapter_lora_init(self.model, str(path).encode())
        if not adapter:
            raise SystemExit(f"cannot load {path}")
        adapters = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        if lib.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(scale)):
            raise SystemExit(f"cannot use {path}")

    @property
    def bos(self) -> int | None:
        """The token every text begins with, where the model's metadata asks for one."""
        return lib.llama_vocab_bos(self.vocab) if lib.llama_vocab_get_add_bos(self.vocab) else None

    def ends(self, token: int) -> bool:
        return lib.llama_vocab_is_eog(self.vocab, token)

    def metadata(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(1 << 16)
        if lib.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer)) < 0:
            raise KeyError(key)
        return buffer.value.decode()

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids without BOS; ``special`` reads control tokens such as <|im_start|> out of the text."""
        data = text.encode()
        ids = (lib.llama_token * (len(data) + 8))()
        count = lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, special)
        return list(ids[:count])

    def clear(self) -> None:
        lib.llama_memory_clear(self.memory, True)

    def share(self, source: int, target: int) -> None:
        """Copies what one sequence holds to another."""
        lib.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def forget(self, position: int) -> None:
        """Drops everything at or after ``position`` in every sequence."""
        lib.llama_memory_seq_rm(self.memory, -1, position, -1)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int] | None = None,
        outputs: Sequence[bool] | None = None,
    ) -> NDArray[np.float32]:
        """Runs one batch. Returns the logits [outputs, vocab] of the marked rows (default: the last), a view."""
        count, batch = len(tokens), self._batch
        if count > self.batch_size:
            raise ValueError(f"{count} tokens in a batch of {self.batch_size}")
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i] = tokens[i], positions[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequences[i] if sequences else 0
            batch.logits[i] = outputs[i] if outputs else i == count - 1
        status = lib.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = sum(outputs) if outputs else 1
        logits = lib.llama_get_logits(self.context)  # waits for the computation
        return np.ctypeslib.as_array(logits, shape=(rows, self.vocab_size))

    def prefill(self, tokens: Sequence[int], sequence: int = 0) -> NDArray[np.float32]:
        """Reads a prompt into an empty sequence; the logits of its last token."""
        for start in range(0, len(tokens), self.batch_size):
            part = tokens[start : start + self.batch_size]
            logits = self.decode(part, range(start, start + len(part)), [sequence] * len(part))
        return logits[0]
