"""Evidence: what ran, by digest; written once, chained in a ledger, verified offline."""
