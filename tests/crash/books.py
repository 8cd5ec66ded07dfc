"""The bank's tables, and what must be true of them and of ours after a crash."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Column, Integer, MetaData, String, Table

ACCOUNTS: Final = {"source": 1_000, "target": 1_000}

metadata = MetaData()
TEXT: Final = String(100)  # MySQL and MariaDB ask for a length
accounts = Table("account", metadata, Column("id", TEXT, primary_key=True), Column("balance", Integer))
bookings = Table(
    "booking",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", TEXT),
    Column("step", TEXT),
    Column("direction", TEXT),
    Column("delta", Integer),
)
orders = Table("orders", metadata, Column("id", TEXT, primary_key=True))

# What was stopped may not have run at all; if it has, it is undone, and nothing else was begun.
STOPPED: Final = [[], [("hold", "forward"), ("hold", "compensate")]]
EFFECTS: Final = {
    ("payment", "completed"): [[("debit", "forward"), ("credit", "forward"), ("approve", "forward")]],
    ("payment", "compensated"): [
        [("debit", "forward"), ("credit", "forward"), ("credit", "compensate"), ("debit", "compensate")]
    ],
    ("stopped", "compensated"): STOPPED,
    ("late", "compensated"): STOPPED,
}


class Books:
    """Reads every table as rows; the same for a file and for what a server's tables gave."""

    def __init__(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        self.rows = rows

    @classmethod
    def of_file(cls, path: Path) -> Books:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        connection.row_factory = sqlite3.Row
        found = {}
        for name in TABLES:
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [name]).fetchone():
                found[name] = [dict(row) for row in connection.execute(f"SELECT * FROM {name}")]
        connection.close()
        return cls(found)

    def of(self, name: str) -> list[dict[str, Any]]:
        return self.rows.get(name, [])

    def check_always(self) -> None:
        """What holds at any moment, a crash included: I2, I10, I11, C-02."""
        effects = Counter((row["run"], row["step"], row["direction"]) for row in self.of("booking"))
        assert set(effects.values()) <= {1}, effects
        versions: dict[str, list[int]] = {}
        for row in sorted(self.of("saga_history"), key=lambda row: row["version"]):
            versions.setdefault(str(row["run_id"]), []).append(row["version"])
        for row in self.of("saga_instance"):
            assert versions[str(row["run_id"])] == list(range(1, row["version"] + 1))
        started = {row["saga_id"] for row in self.of("saga_instance")}
        assert {row["id"] for row in self.of("orders")} == {each for each in started if "session" in each}

    def check_rest(self, expected: dict[str, str]) -> None:
        """What holds once all has ended: I1 to I4, I6, I8."""
        self.check_always()
        ends = {row["saga_id"]: row["status"] for row in self.of("saga_instance")}
        assert ends == expected, ends
        balances = {row["id"]: row["balance"] for row in self.of("account")}
        assert sum(balances.values()) == sum(ACCOUNTS.values())
        moved = sum(10 for status in ends.values() if status == "completed")
        assert balances["target"] == ACCOUNTS["target"] + moved
        for row in self.of("saga_instance"):
            effects = [
                (each["step"], each["direction"])
                for each in sorted(self.of("booking"), key=lambda each: each["id"])
                if str(each["run"]).replace("-", "") == str(row["run_id"]).replace("-", "")
            ]
            assert effects in EFFECTS[row["saga"], row["status"]], row["saga_id"]
        assert not self.of("saga_outbox")
        assert not self.of("saga_outbox_delayed")
        assert not self.of("saga_outbox_blocked")
        assert not self.of("saga_pending_reply")
        assert not self.of("saga_parked")
        assert not [row for row in self.of("saga_incident") if row["resolved_at"] is None]


TABLES: Final = (
    *("account", "booking", "orders"),
    *("saga_instance", "saga_history", "saga_outbox", "saga_outbox_delayed", "saga_outbox_blocked"),
    *("saga_pending_reply", "saga_parked", "saga_incident"),
)
