"""One run over two hosts: what the second one does for it, and both of them planned, launched and followed as one."""
