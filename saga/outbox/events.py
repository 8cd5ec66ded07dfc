"""The outbox on its own: a domain event is a row in the caller's transaction, and is sent if that commits (row F-01).

    async with AsyncSession(engine) as session, session.begin():
        session.add(order)
        await app.outbox.publish(OrderPlaced(id=order.id), topic="orders", key=order.id, session=session)

Events of one key leave in the order of their rows; rows of one key are in the order of their commits where the writers
take turns on it, as they do when they change the same business row first. At least once, so consumers look at the `id`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import to_json

from saga.clock import Clock, Ids
from saga.errors import ConfigurationError, PayloadInvalid
from saga.messages import DUE_ATTRIBUTE
from saga.payloads import check_size
from saga.storage.base import EventStore, OutboxRow, part_of

if TYPE_CHECKING:
    from saga.storage.base import CallersSession

DELAY_MAX: Final = timedelta(days=366)
KEY_LENGTH_MAX: Final = 200
NAME: Final = re.compile(r"[a-z0-9]{1,20}")
RESERVED: Final = frozenset(
    {"specversion", "type", "source", "id", "subject", "time", "datacontenttype", "namespace", "data"}
    | {DUE_ATTRIBUTE, "sagaattempt", "sagasince"}
)


class Outbox:
    """Publishes domain events to the topics that the app declares."""

    def __init__(
        self,
        store: EventStore,
        topics: frozenset[str],
        *,
        namespace: str,
        clock: Clock,
        ids: Ids,
        after_commit: Callable[[Any], None],
    ) -> None:
        self._store = store
        self._topics = topics
        self._namespace = namespace
        self._clock = clock
        self._ids = ids
        self._after_commit = after_commit

    async def publish(
        self,
        event: BaseModel,
        *,
        topic: str,
        session: CallersSession,
        key: str = "",
        type: str | None = None,
        attributes: Mapping[str, str] | None = None,
        delay: timedelta | None = None,
        not_before: datetime | None = None,
    ) -> UUID:
        """Write an event into the caller's transaction and return its id, which is the message's.

        `session` is an AsyncSession, a plain Session, or a connection of either.

        Sent within 2 s of the commit, normally at once, and never without it. `type` is the CloudEvents type, by
        default the class's name; `attributes` are CloudEvents extension attributes. `delay` or `not_before` (aware),
        1 year at most, keep it in the database until then; it is sent within a second of that. No `key`, no order.
        Raises ConfigurationError (a topic that the app does not declare), PayloadInvalid, PayloadTooLarge,
        WrongDatabase.
        """
        if topic not in self._topics:
            raise ConfigurationError(f"The app declares no topic {topic!r}; say App(topics=[...]).")
        self._check(key, attributes or {})
        due = self._due(delay, not_before)
        message_id = self._ids.uuid7()
        body = self._envelope(event, message_id, key, type, attributes or {}, due)
        check_size(body, what=f"event on {topic!r}")
        ordering_key = key or str(message_id)
        row = OutboxRow(message_id, part_of(ordering_key), topic, ordering_key, body)
        await self._store.append(session, row, due)
        if due is None:
            # P19: the event of the session only wakes the relay, which reads what is really committed
            self._after_commit(session)
        return message_id

    async def revoke(self, id: UUID, *, session: CallersSession | None = None) -> bool:
        """Take a delayed event back, in the caller's transaction if `session` is given; return whether it was in time.

        It was not if its time has come, or if nobody knows the id: then it is sent, or was. Never both.
        """
        return await self._store.revoke(session, id)

    def _envelope(
        self,
        event: BaseModel,
        id: UUID,
        key: str,
        type_: str | None,
        attributes: Mapping[str, str],
        due: timedelta | datetime | None,
    ) -> bytes:
        try:
            data = event.model_dump_json(warnings="error").encode()
        except ValueError:
            raise PayloadInvalid(f"The event is not a {type(event).__name__}.") from None
        now = self._clock.now()
        head: dict[str, Any] = {
            "specversion": "1.0",
            "type": type_ or type(event).__name__,
            "source": f"/saga/{self._namespace}",
            "id": str(id),
            "time": now.isoformat(),
            "datacontenttype": "application/json",
            "namespace": self._namespace,
            **attributes,
        }
        if key:
            head["subject"] = key
        if due is not None:
            head[DUE_ATTRIBUTE] = (due if isinstance(due, datetime) else now + due).isoformat()
        return to_json(head)[:-1] + b',"data":' + data + b"}"

    def _check(self, key: str, attributes: Mapping[str, str]) -> None:
        if len(key) > KEY_LENGTH_MAX or "\0" in key:
            raise PayloadInvalid(f"A key has at most {KEY_LENGTH_MAX} characters and no NUL.")
        for name in attributes:
            if not NAME.fullmatch(name) or name in RESERVED:
                raise PayloadInvalid(
                    f"{name!r} cannot name an attribute: 1 to 20 of a-z and 0-9, none of ours."
                )

    def _due(self, delay: timedelta | None, not_before: datetime | None) -> timedelta | datetime | None:
        if delay is not None and not_before is not None:
            raise PayloadInvalid("Give delay or not_before, not both.")
        if not_before is not None and not_before.tzinfo is None:
            raise PayloadInvalid("not_before is an aware datetime.")
        ahead = delay if not_before is None else not_before - self._clock.now()
        if ahead is None or ahead <= timedelta():
            return None
        if ahead > DELAY_MAX:
            raise PayloadInvalid("An event waits for at most a year.")
        return delay if not_before is None else not_before
