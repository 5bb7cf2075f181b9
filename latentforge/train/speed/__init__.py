"""Where the time of a training step goes: the parts of real steps, beside the machine's own speed."""
