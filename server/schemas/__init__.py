"""The wire format as msgspec structs, and nothing else."""
