"""One file for each change of the ledger, small and with its reason."""
