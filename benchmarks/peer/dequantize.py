"""Rewrites a GGUF with every tensor as float32: the same weights without a quantised product anywhere.

    python benchmarks/peer/dequantize.py MODEL.gguf MODEL.f32.gguf

llama.cpp rounds activations to 8 bits before it multiplies them with quantised weights. On the file written here it
computes in float32, so what is left of its distance to another engine is that engine's. Runs under the project's
Python (numpy and gguf). The file has four bytes a weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue  # the writer makes these itself
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_file_type(LlamaFileType.ALL_F32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    reader = GGUFReader(args.source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(args.target, architecture)
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * tensor.n_elements)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        data = dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type))
        writer.write_tensor_data(np.ascontiguousarray(data, np.float32))
    writer.close()


if __name__ == "__main__":
    main()
