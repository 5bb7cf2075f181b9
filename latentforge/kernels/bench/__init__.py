"""How fast the kernels are on this machine, beside torch, beside peers and beside the memory's own speed."""
