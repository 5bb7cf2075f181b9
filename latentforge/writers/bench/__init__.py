"""How fast trained students write, side by side on this machine, and what a pipeline asks of it."""
