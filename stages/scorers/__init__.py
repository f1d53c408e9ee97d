"""How likely does a frozen model find each token of an answer? vLLM or transformers says."""
