"""Model runners: the compiled prefill and decode steps of a model, and the states they carry."""
