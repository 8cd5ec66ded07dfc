"""Rows to publish: direct publishing after a commit, the relay that sweeps what it left, and parking."""
