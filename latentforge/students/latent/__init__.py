"""The latent student: K tokens of text as one step."""
