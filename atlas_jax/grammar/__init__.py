"""JSON schemas as grammars, in processes of their own; without JAX, which must not be forked.

`worker` is the program of those processes, `schema` what it changes in a schema before it compiles it, `answer` how far
one answer has come, and `wire` what is said between the processes. The engine's side is
`atlas_jax.engine.scheduler.structured_output`.
"""
