"""The part of LatentForge that runs on hosts: standard library only, Python 3.10 or later, nothing of the project."""
