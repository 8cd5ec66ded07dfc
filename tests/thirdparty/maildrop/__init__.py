"""A folder of files as a broker: `maildrop:///var/spool/drop`. A package of its own, found by its entry point."""

from maildrop.broker import MAILDROP, Maildrop

__all__ = ["MAILDROP", "Maildrop"]
