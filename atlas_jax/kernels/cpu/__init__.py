"""The native CPU kernels: C sources in `csrc/`, built once and called through XLA's foreign-function interface (`ffi`)."""
