"""A teacher behind an OpenAI-compatible HTTP server: the client, its flow control, and the proof of what it answers."""
