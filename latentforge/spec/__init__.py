"""What is asked for: pipeline files, the runs they lead to, and the identity of each run."""
