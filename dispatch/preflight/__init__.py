"""Whether a host is fit for a run: facts gathered in one call, judged here by pure functions, each with its remedy."""
