"""A vLLM of our own: started, supervised and stopped with its whole process tree; as a server or as an engine."""
