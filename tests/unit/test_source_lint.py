"""Each of our source rules catches its bad fixture and lets the good one pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from devservices.lint import RULES, check, main

BAD: dict[str, list[str]] = {
    "clock": [
        "import time\ntime.time()",
        "import time as t\nt.monotonic()",
        "from time import sleep\nsleep(1)",
        "import time\nclock = time.monotonic",
        "from datetime import datetime as dt, UTC\ndt.now(UTC)",
        "import datetime\ndatetime.datetime.utcnow()",
        "import asyncio\nasyncio.get_running_loop().time()",
    ],
    "sleep": [
        "import asyncio\nasync def f():\n    await asyncio.sleep(1)",
        "from asyncio import sleep as nap\nnap(1)",
    ],
    "ids": ["import uuid\nuuid.uuid4()", "from uuid import uuid1\nuuid1()", "import os\nos.urandom(8)"],
    "random": [
        "import random\nrandom.random()",
        "from random import uniform\nuniform(0, 1)",
        "import secrets\nsecrets.token_hex()",
    ],
    "spawn": [
        "import asyncio\nasyncio.create_task(f())",
        "import asyncio\nasyncio.ensure_future(f())",
        "loop.create_task(f())",
    ],
    "wait-for": [
        "import asyncio\nasyncio.wait_for(f(), 1)",
        "from asyncio import wait_for\nwait_for(f(), 1)",
    ],
    "mandatory-false": ["exchange.publish(message, key, mandatory=False)"],
    "process-context": [
        "async def f(message):\n    async with message.process():\n        pass",
        "self.delivery.process(requeue=True)",
    ],
    "sql": [
        "from sqlalchemy import text\ntext(f'SELECT * FROM {table}')",
        "connection.execute('SELECT %s' % value)",
        "connection.execute('SELECT ' + value)",
        "connection.exec_driver_sql('SELECT {}'.format(value))",
        "connection.execute('SELECT ' + f'{value}')",
    ],
    "sql-now": ["import sqlalchemy as sa\nsa.func.now()", "from sqlalchemy import func\nfunc.now()"],
    "log-exception": [
        "try:\n    f()\nexcept ValueError as e:\n    logger.error('broken: %s', e)",
        "try:\n    f()\nexcept ValueError as e:\n    log.warning(f'broken: {e}')",
        "try:\n    f()\nexcept ValueError as e:\n    self._log.warning('broken: ' + str(e))",
        "try:\n    f()\nexcept ValueError as e:\n    log.warning('broken', extra={'text': repr(e)})",
        "def f(cause: BaseException | None):\n    log.info('broken: %s', cause)",
        "logger.error('broken', exc_info=True)",
        "logger.exception('broken')",
    ],
    "namespace": [
        "from sqlalchemy import select\nselect(i.run_id).where(i.saga == saga).limit(1)",
        "from sqlalchemy import delete\ndef f(c):\n    c.execute(delete(t.outbox).where(o.id == 1))\n    n.namespace",
        "import sqlalchemy as sa\nsa.update(t.instance).values(version=1)",
        "DELETE = 'DELETE FROM saga_outbox WHERE id = 1'",
    ],
    "unsafe-import": [
        "import pickle",
        "from yaml import load",
        "eval('1')",
        "exec('x = 1')",
        "import importlib\nimportlib.import_module(message.type)",
        "__import__(name)",
    ],
    "broad-except": [
        "while True:\n    try:\n        f()\n    except Exception:\n        pass",
        "while True:\n    try:\n        f()\n    except (ValueError, BaseException):\n        continue",
        "while True:\n    try:\n        f()\n    except:\n        continue",
    ],
}

GOOD: dict[str, str] = {
    "clock": "from datetime import datetime\ndef f(clock, time):\n    time.time()\n    return datetime.fromisoformat(clock.now())",
    "sleep": "async def f(clock):\n    await clock.sleep(1)",
    "ids": "import uuid\nuuid.UUID(int=1)",
    "random": "def f(random):\n    return random.uniform(0, 1)",
    "spawn": "spawner.spawn(f())",
    "wait-for": "import asyncio\nasync def f():\n    async with asyncio.timeout(1):\n        pass",
    "mandatory-false": "exchange.publish(message, key, mandatory=True)",
    "process-context": "processor.process(batch)",
    "sql": "from sqlalchemy import text\ntext('SELECT :id ' 'FROM t')\nconnection.execute('SELECT ' + 'a', {'id': 1})",
    "sql-now": "from sqlalchemy import func\nfunc.clock_timestamp()",
    "log-exception": "try:\n    f()\nexcept ValueError as e:\n    logger.error('broken: %s %s', type(e).__name__, e.code, exc_info=False)\ndef g(e: str):\n    logger.error('broken: %s', e)",
    "namespace": "from sqlalchemy import func, select\nselect(i.run_id).where(i.namespace == ns)\nselect(func.now_())\nS = 'SELECT 1 FROM saga_outbox WHERE namespace = ?'",
    "unsafe-import": "import json, importlib\nmodel.eval_all()\nimportlib.import_module('json')",
    "broad-except": "while True:\n    try:\n        f()\n    except OSError:\n        pass\ntry:\n    f()\nexcept Exception:\n    pass",
}


def rules_of(source: str, path: str = "saga/coordinator/loop.py") -> set[str]:
    return {finding.rule for finding in check(source, path)}


def test_every_rule_has_a_bad_and_a_good_fixture() -> None:
    assert set(BAD) == set(RULES) == set(GOOD)


@pytest.mark.parametrize(
    ("rule", "source"), [(rule, source) for rule, many in BAD.items() for source in many]
)
def test_bad_code_is_caught(rule: str, source: str) -> None:
    assert rules_of(source) == {rule}


@pytest.mark.parametrize("rule", GOOD)
def test_good_code_passes(rule: str) -> None:
    assert rules_of(GOOD[rule]) == set()


@pytest.mark.parametrize("rule", BAD)
def test_an_allowance_with_a_reason_silences_its_rule_only(rule: str) -> None:
    source = BAD[rule][0]
    line = check(source, "saga/x.py")[0].line - 1
    lines = source.splitlines()
    allowed = [
        *lines[:line],
        f"{_indent(lines[line])}# lint: allow {rule} because this test wants it",
        *lines[line:],
    ]
    assert rules_of("\n".join(allowed)) == set()
    other = "sleep" if rule != "sleep" else "clock"
    assert rule in rules_of("\n".join(allowed).replace(f"allow {rule}", f"allow {other}"))


@pytest.mark.parametrize(
    "comment",
    ["# lint: allow clock", "# lint: allow clock because", "# lint: allow tea because it is five o'clock"],
)
def test_an_allowance_without_reason_or_rule_is_a_finding(comment: str) -> None:
    assert "allowance" in rules_of(f"import time\ntime.time()  {comment}")


def test_an_allowance_that_silences_nothing_is_a_finding() -> None:
    assert rules_of("x = 1  # lint: allow clock because it once was one") == {"allowance"}


def test_an_allowance_quoted_in_a_string_is_none() -> None:
    assert rules_of("import time\ntime.time(), '# lint: allow clock because of nothing'") == {"clock"}


def test_the_ports_module_may_make_time_ids_and_tasks() -> None:
    source = "import time, uuid, random, asyncio\ntime.time(); uuid.uuid4(); random.random(); asyncio.create_task(f())"
    assert rules_of(source, "saga/clock.py") == set()
    assert rules_of(source) == {"clock", "ids", "random", "spawn"}


def test_examples_may_make_ids_but_no_time_and_no_sql_by_hand() -> None:
    source = "import time, uuid\nuuid.uuid4(); time.time(); session.execute(f'SELECT {x}')"
    assert rules_of(source, "examples/money_transfer/app.py") == {"clock", "sql"}


def test_the_program_names_file_line_rule_and_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "saga").mkdir()
    (tmp_path / "saga" / "bad.py").write_text("import time\n\ntime.time()\n")
    assert main([str(tmp_path)]) == 1
    assert "saga/bad.py:3: clock: time.time: time comes from the port Clock" in capsys.readouterr().out
    (tmp_path / "saga" / "bad.py").write_text("x = 1\n")
    assert main([str(tmp_path)]) == 0


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]
