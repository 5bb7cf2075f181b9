"""Promotion: a student leaves the runs' folder only with its evidence verified and its claims passed."""
