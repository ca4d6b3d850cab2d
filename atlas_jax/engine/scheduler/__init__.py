"""Continuous batching: admission, prefill, the decode batch, and what every request has produced so far."""
