"""Log-probabilities and greedy answers of a frozen model, computed by vLLM or transformers."""
