"""What a model will take, and the ledger that is never overdrawn; nothing here runs a model."""
