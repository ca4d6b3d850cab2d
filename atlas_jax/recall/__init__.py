"""The recall memory of pretrained models: an Omega memory over their hidden states, fitted without training."""
