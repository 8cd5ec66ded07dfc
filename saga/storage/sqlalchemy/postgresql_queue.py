"""The database broker's statements on PostgreSQL: each call is one statement, and a transaction by itself.

Claims and acks do not wait for the disk (`synchronous_commit` off for the one statement): what a crash of the server
takes back of them is a message that is delivered once more. What is published waits, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Insert, func, text
from sqlalchemy.dialects.postgresql import insert as postgresql_insert

from saga.brokers.base import OutMessage, PublishOutcome
from saga.clock import Clock, Ids
from saga.storage.queue import Claimed
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.queue import QueueStatements, headers_text

APPEND: Final = text("""
WITH m AS MATERIALIZED (
  SELECT * FROM unnest(CAST(:channels AS text[]), CAST(:message_ids AS uuid[]), CAST(:keys AS text[]),
                       CAST(:content_types AS text[]), CAST(:headers AS text[]), CAST(:bodies AS bytea[]))
         WITH ORDINALITY AS m(channel, message_id, ordering_key, content_type, headers, body, n)),
known AS MATERIALIZED (SELECT name FROM saga_channel WHERE name IN (SELECT DISTINCT channel FROM m)),
put AS (
  INSERT INTO saga_queue (channel, message_id, ordering_key, content_type, headers, body, created_at)
  SELECT m.channel, m.message_id, m.ordering_key, m.content_type, m.headers, m.body, statement_timestamp()
    FROM m WHERE m.channel IN (SELECT name FROM known) ORDER BY m.n)
SELECT name FROM known
""")

# `due` and `fresh` are locked before anything is changed, so a claim beside this one skips them (PG-3). A row that was
# taken after our snapshot began is gone when it is locked, and is left out.
CLAIM: Final = text("""
WITH due AS MATERIALIZED (
  SELECT id FROM saga_claim
   WHERE token IS NULL AND channel = CAST(:channel AS text) AND due_at <= clock_timestamp()
   ORDER BY id LIMIT CAST(:limit AS bigint) FOR UPDATE SKIP LOCKED),
again AS (
  UPDATE saga_claim k SET token = CAST(:token AS uuid), due_at = NULL, deliveries = k.deliveries + 1
    FROM due WHERE k.id = due.id
  RETURNING k.id, k.deliveries, k.content_type, k.headers, k.body),
fresh AS MATERIALIZED (
  SELECT id FROM saga_queue
   WHERE channel = CAST(:channel AS text) AND id > CAST(:above AS bigint)
   ORDER BY id LIMIT CAST(:limit AS bigint) - (SELECT count(*) FROM due) FOR UPDATE SKIP LOCKED),
moved AS (
  DELETE FROM saga_queue q USING fresh WHERE q.id = fresh.id
  RETURNING q.id, q.channel, q.message_id, q.ordering_key, q.content_type, q.headers, q.body, q.created_at),
put AS (
  INSERT INTO saga_claim (id, channel, token, deliveries, message_id, ordering_key, content_type, headers, body,
                          created_at)
  SELECT id, channel, CAST(:token AS uuid), 1, message_id, ordering_key, content_type, headers, body, created_at
    FROM moved)
SELECT id, deliveries, content_type, headers, body, (SELECT set_config('synchronous_commit', 'off', true))
  FROM (SELECT id, deliveries, content_type, headers, body FROM again
        UNION ALL SELECT id, 1, content_type, headers, body FROM moved) AS taken
 ORDER BY id
""")

ACK: Final = text("""
DELETE FROM saga_claim
 WHERE id = ANY(CAST(:ids AS bigint[])) AND token = CAST(:token AS uuid)
   AND (SELECT set_config('synchronous_commit', 'off', true)) = 'off'
""")

GIVE_BACK: Final = text("""
UPDATE saga_claim
   SET token = NULL, due_at = clock_timestamp() + CAST(:seconds AS double precision) * interval '1 second'
 WHERE id = ANY(CAST(:ids AS bigint[])) AND token = CAST(:token AS uuid)
""")

# A consumer lives if it has renewed in time and its process still holds its lock. All of it is one snapshot: a claim
# that a consumer commits just after it ran out has no living consumer either, and is found by the next renewal.
RENEW: Final = text("""
WITH present AS MATERIALIZED (
  SELECT (l.classid::bigint << 32) | l.objid::bigint AS presence FROM pg_locks l
   WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
     AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())),
living AS MATERIALIZED (
  SELECT token FROM saga_consumer
   WHERE token = ANY(CAST(:tokens AS uuid[]))
      OR expires_at > clock_timestamp() AND (presence IS NULL OR presence IN (SELECT presence FROM present))),
renewed AS (
  UPDATE saga_consumer
     SET presence = CAST(:presence AS bigint),
         expires_at = clock_timestamp() + CAST(:seconds AS double precision) * interval '1 second'
   WHERE token = ANY(CAST(:tokens AS uuid[])) RETURNING token),
gone AS (DELETE FROM saga_consumer WHERE token NOT IN (SELECT token FROM living)),
free AS (
  UPDATE saga_claim SET token = NULL, due_at = clock_timestamp()
   WHERE token IN (SELECT token FROM saga_claim WHERE token IS NOT NULL EXCEPT SELECT token FROM living))
SELECT token FROM renewed
""")

WAITING: Final = text("""
SELECT c.name FROM unnest(CAST(:channels AS text[])) AS c(name)
 WHERE EXISTS (SELECT 1 FROM saga_queue q WHERE q.channel = c.name)
    OR EXISTS (SELECT 1 FROM saga_claim k
                WHERE k.token IS NULL AND k.channel = c.name AND k.due_at <= clock_timestamp())
UNION ALL
SELECT NULL WHERE EXISTS (SELECT 1 FROM saga_outbox_delayed d
                           WHERE d.namespace = CAST(:delayed_of AS text) AND d.due_at <= clock_timestamp())
""")


class PostgreSQLQueueStatements(QueueStatements):
    """The same calls, one statement each. `presence` returns the lock that this process holds, if it does."""

    def __init__(
        self, clock: Clock, ids: Ids, presence: Callable[[], int | None], delayed_of: str | None = None
    ) -> None:
        super().__init__(clock, ids, delayed_of)
        self._presence = presence

    def presence(self) -> int | None:
        return self._presence()

    def now(self, connection: Connection) -> Any:
        return func.clock_timestamp()

    def insert_channels(self) -> Insert:
        return postgresql_insert(t.channel).on_conflict_do_nothing()

    def publish(
        self, connection: Connection, messages: Sequence[OutMessage], length_max: int | None
    ) -> list[PublishOutcome]:
        if length_max is not None:
            return super().publish(connection, messages, length_max)
        known = self._append(connection, messages)
        return [
            PublishOutcome.CONFIRMED if message.channel in known else PublishOutcome.UNROUTABLE
            for message in messages
        ]

    def append(self, connection: Connection, messages: Sequence[OutMessage]) -> None:
        self._append(connection, messages)

    def _append(self, connection: Connection, messages: Sequence[OutMessage]) -> set[str]:
        parameters = {
            "channels": [message.channel for message in messages],
            "message_ids": [self.ids.uuid7() for _ in messages],
            "keys": [message.key for message in messages],
            "content_types": [message.content_type for message in messages],
            "headers": [headers_text(message) for message in messages],
            "bodies": [message.body for message in messages],
        }
        return set(connection.execute(APPEND, parameters).scalars())

    def claim(
        self, connection: Connection, token: UUID, channel: str, above: int, limit: int
    ) -> list[Claimed]:
        parameters = {"token": token, "channel": channel, "above": above, "limit": limit}
        return [Claimed(*row[:5]) for row in connection.execute(CLAIM, parameters)]

    def settle(
        self,
        connection: Connection,
        token: UUID,
        acked: Collection[int],
        returned: Collection[int],
        pause_seconds: float,
    ) -> None:
        if acked:
            connection.execute(ACK, {"token": token, "ids": sorted(acked)})
        if returned:
            connection.execute(GIVE_BACK, {"token": token, "ids": sorted(returned), "seconds": pause_seconds})

    def renew(self, connection: Connection, tokens: Collection[UUID], seconds: float) -> set[UUID]:
        renewed = connection.execute(
            RENEW, {"tokens": list(tokens), "seconds": seconds, "presence": self.presence()}
        )
        return set(renewed.scalars())

    def waiting(self, connection: Connection, channels: Collection[str]) -> tuple[set[str], bool]:
        parameters = {"channels": sorted(channels), "delayed_of": self.delayed_of}
        found = set(connection.execute(WAITING, parameters).scalars())
        return found - {None}, None in found
