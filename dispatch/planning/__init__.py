"""From what is asked and what is there to the plan that is shown and applied."""
