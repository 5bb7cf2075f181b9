"""The history of runs: those collected here, those that the ledger names, those that hosts hold."""
