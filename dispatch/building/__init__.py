"""Code as a host gets it: one bundle by content, built there into a folder of its own."""
