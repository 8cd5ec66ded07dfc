"""Small storage ports (base) and their SQLAlchemy adapters."""
