"""Handlers that are given arguments by FastStream: a participant that injects what a handler asks it for.

An argument is FastStream's if its default, or its annotation's metadata, is a `Depends` or a `Context`; all others are
the payload, the session and the context of the activity, as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, update_wrapper
from typing import Any, get_type_hints

from fast_depends.dependencies import Dependant
from fast_depends.library import CustomField
from faststream import apply_types

from saga.definition.activity import UNSET, Limit, Participant
from saga.retry import FORWARD, RetryPolicy


class InjectedParticipant(Participant):
    """A participant in a FastStream service."""

    def __init__(
        self, name: str, broker: Any, *, start_to_close: Limit = UNSET, retry: RetryPolicy = FORWARD
    ) -> None:
        super().__init__(name, start_to_close=start_to_close, retry=retry)
        self._broker = broker

    def prepared(self, function: Callable[..., Any]) -> Any:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        own = [
            parameter
            for name, parameter in signature.parameters.items()
            if not _injected(parameter.default, hints.get(name))
        ]
        if len(own) == len(signature.parameters):
            return function
        handler: Any = update_wrapper(self._injecting(function), function)
        del handler.__wrapped__  # or its signature would be looked for there
        names = {"return", *(parameter.name for parameter in own)}
        handler.__annotations__ = {name: hint for name, hint in hints.items() if name in names}
        handler.__signature__ = signature.replace(parameters=own)
        return handler

    def _injecting(self, function: Callable[..., Any]) -> Any:
        broker = self._broker

        @cache
        def injected() -> Callable[..., Any]:
            # at the first call: until it starts, a FastStream object may give the broker its own context and provider
            return apply_types(
                function, cast=False, dependency_provider=broker.provider, context__=broker.context
            )

        def logger() -> Any:
            return broker.context.scope("logger", broker.config.logger.logger.logger)

        async def handler(*args: Any, **kwargs: Any) -> Any:
            with logger():
                return await injected()(*args, **kwargs)

        def plain_handler(*args: Any, **kwargs: Any) -> Any:
            with logger():
                return injected()(*args, **kwargs)

        return handler if inspect.iscoroutinefunction(function) else plain_handler


def _injected(default: Any, hint: Any) -> bool:
    asked = (default, *getattr(hint, "__metadata__", ()))
    return any(isinstance(each, Dependant | CustomField) for each in asked)
