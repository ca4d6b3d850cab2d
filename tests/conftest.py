"""Makes `tiny_model` and the references in `reference/` importable from every test (pytest adds this folder to the path)."""
