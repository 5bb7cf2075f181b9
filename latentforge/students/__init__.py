"""What is trained: token-level causal language models."""
