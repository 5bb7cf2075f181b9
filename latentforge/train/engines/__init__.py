"""One step on any number of processes: a protocol, and the libraries that stand behind it, each called directly."""
