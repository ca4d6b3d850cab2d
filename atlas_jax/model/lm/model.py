"""A Llama-like language model whose layers follow a pattern string, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from atlas_jax.config import ConfigError
from atlas_jax.model.lm.blocks import make_block
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.data import IGNORE
from atlas_jax.model.lm.layers import RMSNorm, weight
from atlas_jax.typing import Array, Bool, Float, Int32

LMParams = dict[str, Any]
"""Parameters as nested dictionaries, as `split` gives them: for optax, orbax and GGUF."""


class LanguageModel(nnx.Module):
    """Token embedding, blocks, norm, head."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs) -> None:
        self.config: LMConfig = nnx.static(config)
        # of the two, the head wants small numbers; RMSNorm makes embeddings of any size alike
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab, config.embed), jnp.float32))
        self.blocks = nnx.List([make_block(config, layer, rngs=rngs) for layer in range(len(config.pattern))])
        self.final_norm = RMSNorm(config.embed, eps=config.norm_eps)
        self.head = None if config.tied_head else weight(rngs, (config.vocab, config.embed), "ve: e -> v", config.embed)

    def __call__(self, tokens: Int32[Array, "B T"], starts: Bool[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Logits of the token after each, in float32 at least.

        Args:
          starts: tokens that begin a document, at multiples of `LMConfig.document_step`; documents of a row know nothing
            of each other. A row is one document if not given.
        """
        if starts is not None and "D" in self.config.pattern:
            raise ConfigError("starts: a model with a layer of kind D takes one document a row")
        document = None if starts is None else jnp.cumsum(starts, axis=1, dtype=jnp.int32)
        x = jnp.take(self.embed[...], tokens, axis=0)
        for block in self.blocks:
            x = block(x, document)
        head = self.embed[...] if self.head is None else self.head[...]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("bte,ve->btv", self.final_norm(x), head, preferred_element_type=wide)


def create(config: LMConfig, seed: int) -> LanguageModel:
    """A model with random weights."""
    return LanguageModel(config, rngs=nnx.Rngs(seed))


def split(model: nnx.Module) -> tuple[Callable[..., Float[Array, "B T V"]], LMParams]:
    """A model as a pure function of its parameters and what it is called with, and the parameters."""
    graph, state = nnx.split(model, nnx.Param)

    def apply(params: LMParams, *inputs: Any) -> Float[Array, "B T V"]:
        return nnx.merge(graph, params)(*inputs)

    return apply, nnx.to_pure_dict(state)


def init_params(config: LMConfig, seed: int) -> LMParams:
    """Random parameters: those of `create`."""
    return split(create(config, seed))[1]


def matrix_axes(model: nnx.Module) -> LMParams:
    """Which axes of each parameter are a matrix, for `atlas_jax.optim.muon`; None for what Adam should train.

    Embedding and head are matrices, but their rows are looked up, not multiplied: Muon leaves them to Adam. So are
    memories' starting weights, gates and convolutions, whose gradients are of another size.
    """
    state = nnx.state(model, nnx.Param)

    def spec(path: tuple[Any, ...], variable: nnx.Variable[jax.Array]) -> str | None:
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        if names & {"start", "gates", "gamma", "head"}:
            return None
        found: str | None = variable.get_metadata().get("matrix")
        return found

    axes = jax.tree_util.tree_map_with_path(spec, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(axes)


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int32[Array | np.ndarray, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean loss in nats and accuracy over the targets that are not `IGNORE`."""
    counts = (targets != IGNORE).astype(logits.dtype)
    total = jnp.maximum(counts.sum(), 1.0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    right = (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype)
    return (nats * counts).sum() / total, (right * counts).sum() / total


def parameter_count(params: LMParams) -> int:
    """Number of trained numbers."""
    return sum(int(x.size) for x in jax.tree.leaves(params))
