"""Plain NumPy float64 definitions that the kernels and the memory are compared with."""
