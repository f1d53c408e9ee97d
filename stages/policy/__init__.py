"""The policy in torch: load a model, lay out batches, compute completion log-probabilities."""
