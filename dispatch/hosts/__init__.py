"""Hosts: which there are, how they are trusted, what a probe saw of them, and whether they are fit."""
