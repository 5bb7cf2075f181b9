"""Many hosts: fallback lanes for one run, and one question to each of several hosts."""
