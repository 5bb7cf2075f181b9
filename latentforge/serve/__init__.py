"""An HTTP server of one writer: OpenAI's completions, a richer schema of our own, health and figures."""
