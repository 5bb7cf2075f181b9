"""Models as a host gets them: pinned, listed before anything moves, resumed file by file, and verified whole."""
