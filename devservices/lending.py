"""Databases lent to one user after the other: emptied when they come back, which takes a tenth of making one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from devservices.base import Service


@dataclass
class _Kind:
    """What all databases of one key begin with."""

    template: str
    tables: Collection[str]
    kept: Collection[str]
    """Those with rows, which nobody changes."""
    spare: list[str] = field(default_factory=list)


class DatabaseServer(Service):
    """A server that we may make databases on."""

    def __init__(self) -> None:
        self._templates: dict[str, str] = {}
        self._kinds: dict[str, _Kind] = {}

    @contextmanager
    def lent(self, key: str, build: Callable[[str], None]) -> Iterator[str]:
        """Give the address of a database as `build(url)` makes it, for the length of a block.

        Afterwards its sessions are ended, its tables emptied, and those dropped that were not there at first. Changes
        of its tables stay: whoever makes one takes it back. Numbers of rows need not begin with 1.
        """
        if key not in self._kinds:
            template = self.template(key, build)
            tables = self._filled(self.database_url(template))
            self._kinds[key] = _Kind(template, tables.keys(), [name for name, rows in tables.items() if rows])
        kind = self._kinds[key]
        url = kind.spare.pop() if kind.spare else self.create_database(template=kind.template)
        try:
            yield url
        except BaseException:
            self.drop_database(url)
            raise
        if self._clean(url, tables=kind.tables, kept=kind.kept):
            kind.spare.append(url)
        else:
            self.drop_database(url)

    def template(self, key: str, build: Callable[[str], None]) -> str:
        """Return the name of a database that `build(url)` has filled once, to be copied by `create_database`."""
        if key not in self._templates:
            url = self.create_database()
            try:
                build(url)
            except BaseException:
                self.drop_database(url)
                raise
            self._templates[key] = self.name_of(url)
        return self._templates[key]

    def close(self) -> None:
        """Drop templates and what is to be lent."""
        for url in [*self._templates.values(), *(url for kind in self._kinds.values() for url in kind.spare)]:
            self.drop_database(url)
        self._templates.clear()
        self._kinds.clear()

    @abstractmethod
    def create_database(self, name: str | None = None, *, template: str | None = None) -> str:
        """Make a database (a fresh name unless one is given) and return its address."""

    @abstractmethod
    def drop_database(self, url_or_name: str) -> None:
        """Drop a database, also while connections to it are open. A missing one is fine."""

    @abstractmethod
    def database_url(self, database: str) -> str:
        """Return the address of a database of this server, for the administrator."""

    @abstractmethod
    def name_of(self, url: str) -> str:
        """Return the database that an address names."""

    @abstractmethod
    def _filled(self, url: str) -> Mapping[str, bool]:
        """Return the names of a database's tables, and whether each has rows."""

    @abstractmethod
    def _clean(self, url: str, *, tables: Collection[str], kept: Collection[str]) -> bool:
        """End a database's sessions, empty `tables` but for `kept`, and drop all others.

        Return False where more than tables was changed, so that it cannot be lent again.
        """
