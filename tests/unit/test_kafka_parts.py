"""G-04: offsets, names, addresses and options of the Kafka adapter, which need no cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saga.adapters import make_broker
from saga.brokers.kafka import KafkaBroker
from saga.brokers.kafka.address import read
from saga.brokers.kafka.names import topic_of
from saga.brokers.kafka.offsets import Window
from saga.brokers.kafka.options import KafkaOptions
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.errors import ConfigurationError

pytestmark = [pytest.mark.feature("G-04"), pytest.mark.stack("postgres-kafka")]


def fetched(*offsets: int) -> Window:
    window = Window(0)
    for offset in offsets:
        window.add(offset)
    return window


@given(st.lists(st.integers(0, 60), min_size=1, unique=True).map(sorted), st.randoms())
def test_a_commit_never_passes_an_unfinished_message(offsets: list[int], random) -> None:  # type: ignore[no-untyped-def]
    """KAF-8: with holes in the offsets too."""
    window = Window(0)
    unfinished = {offset: window.add(offset) for offset in offsets}
    while unfinished:
        assert window.finished_to == min(unfinished)
        assert len(window) == len(unfinished)
        window.finish(unfinished.pop(random.choice(list(unfinished))))
    assert window.finished_to == offsets[-1] + 1


def test_nothing_finished_is_nothing_to_commit() -> None:
    window = fetched(7, 8)
    assert (window.finished_to, window.committed) == (7, 7)


def test_a_message_that_is_handed_out_again_keeps_its_place_and_its_old_token_settles_nothing() -> None:
    window = fetched(1)
    first = window.add(2)
    window.add(3)
    again = window.again(first)
    assert not window.holds(first)
    assert window.holds(again)
    assert (again.returns, again.offset) == (1, 2)
    assert window.finished_to == 1


def test_ahead_counts_from_the_first_unfinished_message() -> None:
    window = Window(0)
    held = [window.add(offset) for offset in range(10)]
    for each in held[1:]:
        window.finish(each)
    assert window.ahead == 10
    window.finish(held[0])
    assert window.ahead == 0


def test_without_the_driver_the_error_names_the_extra() -> None:
    program = "import sys; sys.modules['aiokafka'] = None; import saga.brokers.kafka"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode != 0
    assert "MissingExtra" in ended.stderr
    assert "saga[kafka]" in ended.stderr


@pytest.mark.parametrize("name", ["saga.shop.commands.bank", "orders_v2", "A-b.c", "x" * 249])
def test_a_name_that_kafka_takes_is_the_topic(name: str) -> None:
    assert topic_of(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "żółć", "a b", "a/b", "x" * 250, "saga." + "y" * 400])
def test_any_other_name_becomes_a_legal_topic_of_its_own(name: str) -> None:
    topic = topic_of(name)
    assert 0 < len(topic) <= 249
    assert topic.isascii()
    assert set(topic) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert topic not in (name, ".", "..", topic_of(name + "!"))


def test_an_address_names_brokers() -> None:
    assert read("kafka://one:9092,two:9093").servers == ("one:9092", "two:9093")
    assert read("kafka://one").servers == ("one:9092",)
    assert read("kafka://[::1]:9094,[::2]").servers == ("[::1]:9094", "[::2]:9092")


@pytest.mark.parametrize(
    ("address", "protocol", "mechanism"),
    [
        ("kafka://one", "PLAINTEXT", None),
        ("kafka://one?sslmode=verify-full", "SSL", None),
        ("kafka://me:pass@one", "SASL_PLAINTEXT", "SCRAM-SHA-512"),
        ("kafka://me:pass@one?sasl=plain", "SASL_PLAINTEXT", "PLAIN"),
        ("kafka://me:pass@one,two?sslmode=require&sasl=SCRAM-SHA-256", "SASL_SSL", "SCRAM-SHA-256"),
    ],
)
def test_an_address_says_how_clients_log_in(address: str, protocol: str, mechanism: str | None) -> None:
    told = read(address).client
    assert told["security_protocol"] == protocol
    assert told.get("sasl_mechanism") == mechanism
    assert (told["ssl_context"] is not None) == ("SSL" in protocol.split("_"))


def test_a_name_and_a_password_may_be_quoted() -> None:
    told = read("kafka://a%40b:p%2Fw%3A@one").client
    assert (told["sasl_plain_username"], told["sasl_plain_password"]) == ("a@b", "p/w:")


@pytest.mark.parametrize(
    "address",
    [
        "http://one:9092",
        "kafka://",
        "kafka://one:port",
        "kafka://one:0",
        "kafka://one,",
        "kafka://one/group",
        "kafka://one?a=b",
        "kafka://one?sasl=PLAIN",
        "kafka://me@one?sasl=GSSAPI",
        "kafka://:canary-9b1f@one",
    ],
)
def test_an_address_that_says_something_else_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(address)
    assert "canary" not in caught.value.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"partitions": 0},
        {"replication_factor": 0},
        {"publish_seconds_max": 11.0},
        {"batch_bytes_max": 16_384},
        {"heartbeat_seconds": 5.0},
    ],
)
def test_options_that_cannot_be_kept_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        KafkaOptions(**wrong)  # type: ignore[arg-type]


async def test_an_address_of_kafka_finds_the_adapter() -> None:
    broker = make_broker(
        "kafka://one:9092,two:9093", None, clock=SystemClock(), ids=SystemIds(), spawner=TaskSpawner()
    )
    assert isinstance(broker, KafkaBroker)
    assert not broker.capabilities.single_ack
