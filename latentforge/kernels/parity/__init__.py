"""How far each backend is from fp64, beside how far torch is at the same precision."""
