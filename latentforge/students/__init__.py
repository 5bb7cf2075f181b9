"""What is trained: token-level causal language models, and the latent student."""
