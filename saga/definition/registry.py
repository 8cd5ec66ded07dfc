"""The sagas that a process serves: several versions of one name side by side, each pinned by its content (row A-13)."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from saga.definition.builder import Saga, SagaDefinition
from saga.engine.model import Redrive
from saga.errors import DefinitionChanged, UnknownSaga


class Registry:
    """Definitions by name and version."""

    def __init__(self, redrive: Redrive = Redrive()) -> None:
        self._redrive = redrive
        self._known: dict[tuple[str, int], SagaDefinition] = {}

    def register(self, saga: Saga[Any, Any]) -> SagaDefinition:
        """Check a saga and keep it; the same content again is the same definition.

        Raises DefinitionError, and DefinitionChanged if its name and version stand for another content.
        """
        compiled = saga.compile()
        made = replace(compiled, engine=replace(compiled.engine, redrive=self._redrive))
        known = self._known.setdefault((made.name, made.version), made)
        if known.fingerprint != made.fingerprint:
            raise DefinitionChanged(
                f"Saga {made.name!r} version {made.version} is registered with another content; "
                f"say Saga({made.name!r}, ..., version={made.version + 1}) and keep the old one beside it "
                "for as long as instances of it are open.",
                saga=made.name,
            )
        return known

    def get(self, name: str, version: int) -> SagaDefinition | None:
        """Return the definition, or None if this process does not serve it."""
        return self._known.get((name, version))

    def definitions(self) -> list[SagaDefinition]:
        """Return every definition, by name and version."""
        return [self._known[key] for key in sorted(self._known)]

    def served(self) -> frozenset[tuple[str, int]]:
        """Return the name and version of every saga registered."""
        return frozenset(self._known)

    def require(self, name: str, version: int) -> SagaDefinition:
        """Return the definition. Raises UnknownSaga, which names what comes close."""
        found = self.get(name, version)
        if found is None:
            raise UnknownSaga(self._advice(name, version), saga=name)
        return found

    def latest(self, name: str) -> SagaDefinition:
        """Return the newest version of a saga. Raises UnknownSaga."""
        versions = [version for saga, version in self._known if saga == name]
        return self.require(name, max(versions, default=1))

    def _advice(self, name: str, version: int) -> str:
        versions = sorted(known for saga, known in self._known if saga == name)
        if versions:
            return f"Saga {name!r} has no version {version} here; served: {', '.join(map(str, versions))}."
        close = get_close_matches(name, sorted({saga for saga, _ in self._known}), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "give it to the app's list of sagas."
        return f"No saga {name!r} is registered here; {hint}"
