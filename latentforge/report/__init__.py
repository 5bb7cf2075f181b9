"""Reports: what a run did, as one page that needs nothing else, in a terminal, as plots and for TensorBoard."""
