"""The C kernels for CPUs: sources in `csrc/`, built once (`library`) and called through XLA's FFI (`ffi`)."""
