"""Many replicas on one object store, simulated."""
