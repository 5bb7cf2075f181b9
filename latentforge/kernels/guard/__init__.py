"""The warm-up guard: no kernel enters a training process before it was proven in a child that may die of it."""
