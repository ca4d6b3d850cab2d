"""Experiments, one command each: `python -m atlas_jax.experiments.<name>` writes a plot and a markdown table."""
