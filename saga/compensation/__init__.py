"""What to undo, in which order, and what may be undone at all. Pure."""
