# ruff: noqa: E402
# %% [markdown]
# # A memory that learns while it reads
#
# Runs as a script (`python docs/tutorial.py`) or cell by cell in an editor that knows `# %%`. Needs the `train` extra.

# %%
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import atlas_jax
from atlas_jax import memory
from atlas_jax.memory import Features, presets

print("atlas_jax", atlas_jax.__version__, "on", jax.devices()[0].platform)

# %% [markdown]
# ## 1. Write pairs, read them back
#
# A rule says what a memory is and how it learns. Its parameters are learned outside, its state is what it has read.
# Sixteen random pairs of 16 components fill a matrix of 16 × 16 to the brim.

# %%
pairs, dim = 16, 16
keys = jax.random.normal(jax.random.key(0), (pairs, dim))
values = jax.random.normal(jax.random.key(1), (pairs, dim))


@partial(jax.jit, static_argnames="rule")
def error_after_one_pass(rule: memory.MemoryRule, keys: jax.Array, values: jax.Array, eta: float) -> jax.Array:
    """Writes each pair once; the error of reading all of them, relative to the values."""
    params = memory.init_params(rule, jax.random.key(2))
    tokens = memory.make_tokens(rule, keys, keys, values, eta=eta if rule.uses("eta") else None)
    state, _ = memory.chunked(rule, params, memory.init_state(rule, params), tokens)
    found = memory.read(rule, params, state, keys)
    return jnp.sum((found - values) ** 2) / jnp.sum(values**2)


delta = presets.deltanet(dim, dim)
print(f"delta rule, one token at a time:   {error_after_one_pass(delta, keys, values, 0.35):.3f}")

# %% [markdown]
# ## 2. Look back: the Omega rule
#
# Instead of the last token alone, each step lowers the error of the last c tokens.

# %%
omega = presets.deltanet(dim, dim, window=16)
print(f"omega rule, the last 16 tokens:    {error_after_one_pass(omega, keys, values, 0.25):.3f}")

# %% [markdown]
# ## 3. More room: polynomial features
#
# No rule can put more than 16 pairs exactly into a matrix on 16 components. On all products of two components it holds
# 152. The exact rule finds the best fit there is.

# %%
keys = jax.random.normal(jax.random.key(0), (48, dim))
values = jax.random.normal(jax.random.key(1), (48, dim))
for name, features in {"degree 1": Features(), "degree 2": Features(kind="polynomial", degree=2)}.items():
    best = presets.mesa(dim, dim, features=features, ridge=1e-5)
    print(f"48 pairs, best fit on {name}:      {error_after_one_pass(best, keys, values, 0.0):.3f}")

# %% [markdown]
# ## 4. A language model with a memory in it
#
# One letter per layer: S attends to a short window, A to everything, M is a memory. Training makes the keys, the values
# and the gates; here a few steps on one sentence, to show the pieces.

# %%
from atlas_jax.gguf import BYTE_VOCAB, byte_vocabulary
from atlas_jax.model.lm import LMConfig, export_gguf, import_gguf, init_params, parameter_count, text_batches
from atlas_jax.model.lm.training import TrainConfig, train

text = b"what is read at test time is learned at test time. " * 20
model = LMConfig(
    vocab=BYTE_VOCAB,
    embed=16,
    ff=32,
    heads=2,
    pattern="M",
    rule=presets.linear_attention(8, 8, remat=False),
)
source = text_batches(text, batch=2, length=24, seed=0)
print(f"{parameter_count(init_params(model, 0))} parameters")
trained = train(model, TrainConfig(steps=40, warmup=4, learning_rate=0.05, adam_learning_rate=0.05), source)
print(f"loss {trained.losses[0]:.2f} → {np.mean(trained.losses[-5:]):.2f} nats per byte")

# %% [markdown]
# ## 5. Keep it
#
# As GGUF, bit for bit. A model of `A` layers alone would be a `llama` file, which the server loads.

# %%
with tempfile.TemporaryDirectory() as directory:
    path = Path(directory) / "model.gguf"
    export_gguf(path, model, trained.params, byte_vocabulary())
    _, params = import_gguf(path)
    same = jax.tree.all(jax.tree.map(np.array_equal, params, trained.params))
    print(f"{path.name}: {path.stat().st_size} bytes; every number as it was: {same}")
