"""A run as it goes on: bytes from a cursor, lines, the live display."""
