"""SQLAlchemy Core adapters of the storage ports: tables, one statement module per dialect, migrations."""
