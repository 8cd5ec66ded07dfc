"""F-11: the archive comes before the deletion, and a file is on the disk; a crash between the two doubles a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.util import await_only

from saga import failpoints
from saga.clock import SystemClock
from saga.retention import archive as archives
from saga.retention.archive import FileArchive
from saga.retention.purge import purge
from saga.storage.sqlalchemy import tables as t
from tests.retention.rows import Kept, Rows
from tests.stacks import REPEATED

pytestmark = pytest.mark.feature("F-11")

clock = SystemClock()


def runs_in(path: Path) -> list[str]:
    return [json.loads(line)["instance"]["run_id"] for line in path.read_text().splitlines()]


async def test_m1_a_crash_between_archive_and_deletion_archives_a_run_twice_and_never_none(
    rows: Rows, tmp_path: Path
) -> None:
    """reliability.md M1."""
    run = await rows.add_run()
    path = tmp_path / "runs.jsonl"
    failpoints.arm("M1:raise")
    try:
        with pytest.raises(ConnectionError):
            await purge([rows.runs(archive=FileArchive(path))], clock=clock)
    finally:
        failpoints.disarm()
    assert runs_in(path) == [str(run)]
    assert await rows.left() == {run}

    await purge([rows.runs(archive=FileArchive(path))], clock=clock)
    assert runs_in(path) == [str(run)] * 2
    assert await rows.left() == set()


@pytest.mark.parametrize("stack", ["postgres-rabbitmq", *REPEATED])  # SQLite reads one snapshot
async def test_a_run_that_another_deletes_while_it_is_read_is_left_out_and_not_archived_in_part(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other commits between the reads of two tables; its own archive has the run whole."""
    kept, other = Kept(), Kept()
    await rows.add_run()
    read = rows.store._by_run
    deleted: list[dict[str, int]] = []

    def read_beside_another(connection: Connection, columns: Any, run_ids: Any, *order: Any) -> Any:
        if not deleted and columns[0].table is t.value:
            deleted.append({})
            deleted[0] |= await_only(purge([rows.runs(archive=other)], clock=clock))
        return read(connection, columns, run_ids, *order)

    monkeypatch.setattr(rows.store, "_by_run", read_beside_another)
    assert await purge([rows.runs(archive=kept)], clock=clock) == {"saga_instance": 0}
    assert deleted == [{"saga_instance": 1}]
    assert kept.runs == []
    (whole,) = other.runs
    assert {"input", "output"} <= {each.kind for each in whole.payloads}


async def test_no_more_than_100_runs_are_in_memory_for_the_archive(rows: Rows) -> None:
    """Each may have many payloads of 256 KiB."""
    sizes: list[int] = []

    async def archive(runs: Any) -> None:
        sizes.append(len(runs))

    rows.store._page = 1_000
    for _ in range(101):
        await rows.add_run()
    await purge([rows.runs(archive=archive)], clock=clock)
    assert sizes == [100, 1]


@pytest.mark.stack("sqlite")
@pytest.mark.parametrize("stack", ["sqlite"])
class TestFile:
    async def test_each_run_is_a_line_behind_those_that_are_there(self, rows: Rows, tmp_path: Path) -> None:
        path = tmp_path / "runs.jsonl"
        expected = []
        for _ in range(2):
            expected.append(str(await rows.add_run()))
            await purge([rows.runs(archive=FileArchive(path))], clock=clock)
        assert runs_in(path) == expected

    async def test_what_is_written_is_on_the_disk_when_the_call_returns(
        self, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And so is the name of a new file."""
        synced: list[str] = []
        sync = os.fsync

        def note(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            synced.append(f"{path.name} {path.stat().st_size > 0 if path.is_file() else 'directory'}")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        (tmp_path / "kept").mkdir()
        for _ in range(2):
            await rows.add_run()
            await purge([rows.runs(archive=FileArchive(tmp_path / "kept" / "runs.jsonl"))], clock=clock)
        assert synced == ["runs.jsonl True", "kept directory", "runs.jsonl True"]

    async def test_a_line_that_a_crash_cut_off_spoils_no_other(self, rows: Rows, tmp_path: Path) -> None:
        path = tmp_path / "runs.jsonl"
        path.write_text('{"instance": {"run_')
        run = await rows.add_run()
        await purge([rows.runs(archive=FileArchive(path))], clock=clock)
        torn, whole = path.read_text().splitlines()
        assert torn == '{"instance": {"run_'
        assert json.loads(whole)["instance"]["run_id"] == str(run)

    async def test_without_a_directory_nothing_is_deleted(self, rows: Rows, tmp_path: Path) -> None:
        run = await rows.add_run()
        with pytest.raises(FileNotFoundError):
            await purge([rows.runs(archive=FileArchive(tmp_path / "no" / "runs.jsonl"))], clock=clock)
        assert await rows.left() == {run}


def test_an_archive_may_be_any_async_function() -> None:
    """The type checkers hold it to the protocol."""
    kept: archives.Archive = Kept()
    assert callable(kept)
