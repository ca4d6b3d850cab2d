"""One check of everything that a GPU or TPU may change: numbers, kernels, speed. See `__main__`."""
