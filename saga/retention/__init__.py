"""How long rows are kept: what is purged when, what is archived before, and which commands come too late for it."""
