"""Plain events received: each acted on once, in one local transaction with the row that remembers it (F-08)."""
