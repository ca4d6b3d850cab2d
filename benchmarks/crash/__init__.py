"""Real server processes that are killed and stopped under load: what was acknowledged must be there afterwards."""
