"""The steps that bring a database to the tables of this release, on an Alembic branch and version table of our own.

Each file of `versions` is written by hand and frozen once released. A step gets its `Operations` as an argument and
imports no proxy of Alembic's: those are one per process, and two databases may be upgraded on one loop at once. Every
step can be run again (MDB-9), and adds only; what it replaces is removed one release later (row G-09).
"""
