"""A run over several hosts: how they meet, what the leader's disk lends the others, and how they end together."""
