"""Carriers of the agent's protocol: this machine's own processes, or an SSH connection."""
