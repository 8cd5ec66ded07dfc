"""docs/wire.md against the code: every golden byte vector on the page is what is written and what is read."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import pytest

from saga.compensation.kinds import StepKind
from saga.coordinator.arrivals import reply_event
from saga.engine.events import (
    ActivityCompleted,
    ActivityFailed,
    ActivityRefused,
    CompensationCompleted,
    CompensationFailed,
    CompensationRefused,
    Event,
    FenceFoundEffect,
    LateEffect,
)
from saga.engine.sending import RETRY_AFTER_MAX_MS
from saga.messages import (
    BATCH_CONTENT_TYPE,
    BODY_BYTES_MAX,
    COMMAND_TYPE,
    CONTENT_TYPE,
    PACK_COUNT_MAX,
    REPLY_TYPE,
    Command,
    Direction,
    Outcome,
    Reply,
    command_id,
    commands_channel,
    decode_commands,
    decode_replies,
    encode_command,
    encode_reply,
    pack,
    parking_channel,
    replies_channel,
)

pytestmark = pytest.mark.stack("pure")

PAGE: Final = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
VECTORS: Final = dict(re.findall(r"```json ([\w-]+)\n(.*?)\n```", PAGE, re.DOTALL))

RUN: Final = "01890a5d-ac96-774b-bcce-b302099a8057"
INPUT: Final = b'{"source":"alice","target":"bob","amount":500}'


def id_of(direction: str) -> str:
    return command_id("default", "money-transfer", RUN, "withdraw", 0, 0, direction)


FORWARD: Final = Command(
    id="0198c0de-0000-7000-8000-000000000001",
    namespace="default",
    saga="money-transfer",
    sagaversion=1,
    sagaid="order-4711",
    runid=RUN,
    step="withdraw",
    activity="withdraw",
    direction="forward",
    commandid=id_of("forward"),
    attempt=1,
    final=True,
    remainingms=900_000,
    replyto="saga.default.replies",
)
RESENT: Final = replace(
    FORWARD,
    id="0198c0de-0000-7000-8000-000000000002",
    resend=True,
    remainingms=870_000,
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)
COMPENSATE: Final = replace(
    FORWARD,
    id="0198c0de-0000-7000-8000-000000000003",
    direction="compensate",
    commandid=id_of("compensate"),
    final=False,
    remainingms=None,
)
FENCE: Final = replace(
    COMPENSATE, id="0198c0de-0000-7000-8000-000000000004", direction="fence", commandid=id_of("fence")
)
DONE: Final = Reply(
    id="0198c0de-0000-7000-8000-000000000011",
    namespace="default",
    saga="money-transfer",
    sagaid="order-4711",
    runid=RUN,
    step="withdraw",
    direction="forward",
    commandid=id_of("forward"),
    attempt=1,
    outcome="done",
)
UNDONE: Final = replace(
    DONE, id="0198c0de-0000-7000-8000-000000000014", direction="compensate", commandid=id_of("compensate")
)
FENCED: Final = replace(
    DONE, id="0198c0de-0000-7000-8000-000000000016", direction="fence", commandid=id_of("fence")
)

COMMANDS: Final[dict[str, tuple[Command, bytes]]] = {
    "command-forward": (FORWARD, INPUT),
    "command-resent": (RESENT, INPUT),
    "command-compensate": (COMPENSATE, b'{"input":' + INPUT + b',"output":{"reference":"w-1"},"undo":null}'),
    "command-fence": (FENCE, b'{"input":' + INPUT + b"}"),
}
REPLIES: Final[dict[str, tuple[Reply, bytes]]] = {
    "reply-done": (DONE, b'{"output":{"reference":"w-1"},"undo":null}'),
    "reply-refused": (
        replace(DONE, id="0198c0de-0000-7000-8000-000000000012", outcome="refused"),
        b'{"code":"insufficient_funds","details":{"missing":120}}',
    ),
    "reply-failed": (
        replace(DONE, id="0198c0de-0000-7000-8000-000000000013", outcome="failed"),
        b'{"error":"OperationalError","retryable":true,"retry_after_ms":null}',
    ),
    "reply-undone": (UNDONE, b"null"),
    "reply-nothing-to-undo": (
        replace(UNDONE, id="0198c0de-0000-7000-8000-000000000015", outcome="nothing_to_undo"),
        b"null",
    ),
    "reply-had-run": (replace(FENCED, outcome="had_run"), b'{"output":{"reference":"w-1"},"undo":null}'),
}


def plain(message: Command | Reply) -> dict[str, Any]:
    kind = Command if isinstance(message, Command) else Reply
    return {each.name: getattr(message, each.name) for each in fields(kind)}


def test_every_vector_on_the_page_is_checked_here() -> None:
    assert set(VECTORS) == {*COMMANDS, *REPLIES, "batch"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_written_and_read_as_the_page_says(name: str) -> None:
    command, data = COMMANDS[name]
    on_the_page = VECTORS[name].encode()

    assert encode_command(command, data) == on_the_page
    (read,) = decode_commands(on_the_page)
    assert plain(read) == plain(replace(command, data=json.loads(data)))


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_is_written_and_read_as_the_page_says(name: str) -> None:
    reply, data = REPLIES[name]
    on_the_page = VECTORS[name].encode()

    assert encode_reply(reply, data) == on_the_page
    (read,) = decode_replies(on_the_page)
    assert plain(read) == plain(replace(reply, data=json.loads(data)))


def test_a_batch_is_written_and_read_as_the_page_says() -> None:
    names = ("reply-done", "reply-refused")
    on_the_page = VECTORS["batch"].encode()

    body, content_type = pack([encode_reply(*REPLIES[name]) for name in names])

    assert (body, content_type) == (on_the_page, BATCH_CONTENT_TYPE)
    assert [plain(each) for each in decode_replies(on_the_page)] == [
        plain(replace(REPLIES[name][0], data=json.loads(REPLIES[name][1]))) for name in names
    ]


def test_each_command_id_on_the_page_is_what_its_text_hashes_to() -> None:
    rows = re.findall(r"^\| `(\d+:[^`]+)` \| `([0-9a-f]{32})` \|$", PAGE, re.MULTILINE)

    assert len(rows) >= 4
    for text, wanted in rows:
        namespace, saga, run_id, step, iteration, round, direction = _prefixed(text)
        assert command_id(namespace, saga, run_id, step, int(iteration), int(round), direction) == wanted


def _prefixed(text: str) -> list[str]:
    """Read length-prefixed UTF-8 fields, as another language would have to write them."""
    rest, parts = text.encode(), []
    while rest:
        length, _, rest = rest.partition(b":")
        parts.append(rest[: int(length)].decode())
        rest = rest[int(length) :]
    return parts


@pytest.mark.parametrize(
    ("heading", "written"),
    [
        ("Attributes of a command", encode_command(RESENT, b"null")),
        ("Attributes of a reply", encode_reply(replace(DONE, traceparent="00-x"), b"null")),
    ],
)
def test_the_tables_name_every_attribute_in_the_order_in_which_it_is_written(
    heading: str, written: bytes
) -> None:
    section = PAGE.split(f"### {heading}\n")[1].split("\n#")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)

    assert named == list(json.loads(written))


def test_the_numbers_on_the_page_are_those_of_the_code() -> None:
    for known in (COMMAND_TYPE, REPLY_TYPE, CONTENT_TYPE, BATCH_CONTENT_TYPE):
        assert f"`{known}`" in PAGE
    assert f"{BODY_BYTES_MAX // 1024} KiB ({BODY_BYTES_MAX:,} bytes)" in PAGE
    assert f"at most {PACK_COUNT_MAX} envelopes" in PAGE
    assert f"{RETRY_AFTER_MAX_MS // 86_400_000} days" in PAGE
    for channel in (
        commands_channel("<namespace>", "<queue>"),
        replies_channel("<namespace>"),
        parking_channel("<channel>"),
    ):
        assert f"`{channel}`" in PAGE
    for word in (*Direction, *Outcome):
        assert f"`{word}`" in PAGE
    assert "pivot" in {*StepKind}


@pytest.mark.parametrize(
    ("direction", "outcome", "event"),
    [
        ("forward", "done", ActivityCompleted),
        ("forward", "refused", ActivityRefused),
        ("forward", "failed", ActivityFailed),
        ("compensate", "done", CompensationCompleted),
        ("compensate", "nothing_to_undo", CompensationCompleted),
        ("compensate", "refused", CompensationRefused),
        ("compensate", "failed", CompensationFailed),
        ("fence", "nothing_to_undo", CompensationCompleted),
        ("fence", "had_run", FenceFoundEffect),
        ("fence", "failed", CompensationFailed),
        ("forward", "late_effect", LateEffect),
        ("compensate", "late_effect", LateEffect),
        ("close", "nothing_to_undo", CompensationCompleted),
        ("close", "had_run", FenceFoundEffect),
        ("close", "failed", CompensationFailed),
    ],
)
def test_the_coordinator_understands_each_pair_that_the_page_allows(
    direction: Any, outcome: Any, event: type[Event]
) -> None:
    section = PAGE.split("### Data of a reply\n")[1].split("\n#")[0]
    allowed = set(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section, re.MULTILINE))

    assert (direction, outcome) in allowed
    assert len(allowed) == 15
    assert type(reply_event(replace(DONE, direction=direction, outcome=outcome), 0)) is event
