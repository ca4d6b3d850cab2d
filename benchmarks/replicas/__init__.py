"""Servers that share an object store: kills, moves and what they cost."""
