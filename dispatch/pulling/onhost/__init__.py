"""What runs on the host of a pull: Python's standard library alone, shipped as one zip that is addressed by content."""
