"""LatentForge: distil a large language-model teacher into a fast student on machines that you own."""

__version__ = "0.1.0"
