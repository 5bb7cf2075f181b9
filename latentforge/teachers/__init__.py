"""Where targets come from: backends, what they can do, whose they are, and whether they fit the student."""
