"""Its place makes `tiny_model` and the references importable from every test: pytest adds this folder to the path."""
