"""atlas_jax: JAX-compiled transformers with ATLAS test-time memory (arXiv 2505.23735)."""

from atlas_jax import _platform as _platform  # sets XLA flags: must run before anything imports jax

__version__ = "0.1.0"
