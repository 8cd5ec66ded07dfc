"""Declaring sagas: what a definition says, what is refused, and when it counts as another one."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, Field

from saga.compensation.kinds import StepKind
from saga.definition.activity import Activity, Participant
from saga.definition.builder import STEPS_MAX, Saga
from saga.definition.refs import SAGA_INPUT, arguments, make
from saga.definition.registry import Registry
from saga.errors import DefinitionChanged, DefinitionError, PayloadInvalid, UnknownSaga
from saga.retry import COMPENSATION, FORWARD, RetryPolicy

pytestmark = pytest.mark.stack("pure")

ENDLESS = RetryPolicy(attempts=None, schedule_to_close=None)


class Transfer(BaseModel):
    source: str
    target: str
    amount: int


class Receipt(BaseModel):
    reference: str


class Deposit(BaseModel):
    account: str
    amount: int
    reference: str
    note: str | None = None
    token: UUID = Field(default_factory=uuid4)


bank = Participant("bank", start_to_close=timedelta(seconds=30))
withdraw = bank.contract("withdraw", Transfer, Receipt, compensated=True)
deposit = bank.contract("deposit", Deposit, Receipt, kind=StepKind.PIVOT)
notify = bank.contract("notify", Transfer, type(None), kind=StepKind.RETRIABLE)

start = Saga("transfer", Transfer)
transfer = start.step(withdraw).step(
    deposit,
    make(Deposit, account=start.input.target, amount=start.input.amount, reference=withdraw.out.reference),
)

INPUT = b'{"source":"a","target":"b","amount":5}'


@pytest.mark.feature("A-01")
def test_a_saga_is_immutable_each_step_gives_a_new_one() -> None:
    one = start.step(withdraw)

    assert one is not start
    assert repr(start) == "Saga('transfer', version=1, steps=0)"
    assert repr(one) == "Saga('transfer', version=1, steps=1)"
    assert one.compile() is one.compile()


@pytest.mark.feature("A-01")
def test_a_definition_names_queue_activity_and_needs_of_each_step() -> None:
    steps = transfer.step(notify).compile().steps

    assert [(step.name, step.queue, set(step.needs), step.unchanged) for step in steps] == [
        ("withdraw", "bank", set(), True),
        ("deposit", "bank", {"withdraw"}, False),
        ("notify", "bank", set(), True),
    ]


@pytest.mark.feature("A-02")
def test_a_step_that_takes_the_sagas_input_gets_its_very_bytes() -> None:
    odd = b'{"amount":5,  "target":"b","source":"a"}'

    assert transfer.compile().step_input(0, {SAGA_INPUT: odd}) is odd


@pytest.mark.feature("A-02")
def test_a_made_input_is_built_from_its_references_and_draws_its_defaults() -> None:
    """P32: that is why it is made once and stored."""
    definition = transfer.compile()
    values = {SAGA_INPUT: INPUT, "withdraw": b'{"reference":"r-1"}'}

    first, second = (json.loads(definition.step_input(1, values)) for _ in range(2))

    assert first.pop("token") != second.pop("token")
    assert first == {"account": "b", "amount": 5, "reference": "r-1", "note": None}


@pytest.mark.feature("A-02")
def test_an_output_that_does_not_match_is_refused_with_place_and_without_value() -> None:
    with pytest.raises(PayloadInvalid) as caught:
        transfer.compile().step_input(1, {SAGA_INPUT: INPUT, "withdraw": b'{"reference":12345}'})

    assert (caught.value.saga, caught.value.step) == ("transfer", "deposit")
    assert "reference: string_type" in caught.value.text
    assert "12345" not in caught.value.text


@pytest.mark.feature("A-02")
def test_two_steps_may_share_an_activity_under_two_names() -> None:
    saga = (
        start.step(withdraw, name="first")
        .step(withdraw, name="second")
        .step(deposit, make(Deposit, account="x", amount=1, reference=withdraw.at("second").out.reference))
    )

    assert saga.compile().steps[2].needs == {"second"}


@pytest.mark.feature("A-02")
def test_a_plain_reference_to_an_activity_with_two_steps_is_refused() -> None:
    two = start.step(withdraw, name="first").step(withdraw, name="second")

    with pytest.raises(DefinitionError) as caught:
        two.step(deposit, make(Deposit, account="x", amount=1, reference=withdraw.out.reference))

    assert "first, second" in caught.value.text
    assert "withdraw.at('first').out" in caught.value.text


@pytest.mark.feature("A-02")
def test_a_plain_reference_that_becomes_ambiguous_later_is_refused_at_registration() -> None:
    copied = bank_copy()
    saga = start.step(withdraw).step(
        copied, make(Transfer, source=withdraw.out.reference, target="t", amount=1)
    )
    again = saga.step(withdraw, name="again")

    saga.compile()
    with pytest.raises(DefinitionError, match="SG101"):
        Registry().register(again)


@pytest.mark.feature("A-02")
def test_a_plain_reference_finds_the_one_step_of_its_activity_under_any_name() -> None:
    saga = start.step(withdraw, name="take").step(
        deposit, make(Deposit, account="x", amount=1, reference=withdraw.out.reference)
    )

    assert saga.compile().steps[1].needs == {"take"}


@pytest.mark.feature("A-02")
def test_a_named_reference_to_a_step_of_another_activity_is_refused() -> None:
    other: Any = bank_copy()

    with pytest.raises(DefinitionError) as caught:
        start.step(withdraw).step(
            other, make(Transfer, source=other.at("withdraw").out.reference, target="t", amount=1)
        )

    assert "done by 'withdraw', not by 'copied'" in caught.value.text


def bank_copy() -> Activity[Transfer, Receipt, Any]:
    return Participant("other", start_to_close=None).contract(
        "copied", Transfer, Receipt, kind=StepKind.READ_ONLY
    )


def test_contract_and_implementation_of_one_activity_are_the_same_to_references() -> None:
    twin = Participant("bank", start_to_close=timedelta(seconds=30)).contract(
        "withdraw", Transfer, Receipt, compensated=True
    )
    saga = start.step(withdraw).step(
        deposit, make(Deposit, account="x", amount=1, reference=twin.out.reference)
    )

    assert saga.compile().steps[1].needs == {"withdraw"}


# --- results ----------------------------------------------------------------------------------


def test_without_returns_the_result_is_null() -> None:
    assert transfer.compile().result({SAGA_INPUT: INPUT}) == b"null"


def test_a_result_is_built_like_an_input() -> None:
    class Summary(BaseModel):
        reference: str
        amount: int

    whole = transfer.returns(deposit.out).compile()
    built = transfer.returns(
        make(Summary, reference=deposit.out.reference, amount=start.input.amount)
    ).compile()
    values = {SAGA_INPUT: INPUT, "deposit": b'{"reference":"d-1"}'}

    assert whole.result_needs == built.result_needs == {"deposit"}
    assert whole.result(values) == b'{"reference":"d-1"}'
    assert built.result(values) == b'{"reference":"d-1","amount":5}'


def test_a_result_from_a_step_that_is_not_there_is_refused() -> None:
    with pytest.raises(DefinitionError, match="SG101"):
        start.step(withdraw).returns(deposit.out)


# --- what is refused where it is written --------------------------------------------------------


@pytest.mark.feature("A-01")
def test_a_saga_has_at_most_1_000_steps() -> None:
    saga = start
    for index in range(STEPS_MAX):
        saga = saga.step(withdraw, name=f"s{index}")

    assert len(saga.compile().steps) == 1_000
    with pytest.raises(DefinitionError, match="SG101"):
        saga.step(withdraw, name="one-too-many")


@pytest.mark.feature("A-01")
def test_what_is_wrong_is_said_at_the_line_of_the_step() -> None:
    loose: Any = start  # type checkers refuse most of this already: tests/typing
    model: Any = Deposit
    wrong: list[Any] = [
        lambda: start.step(withdraw).step(withdraw),
        lambda: loose.step(deposit),
        lambda: start.step(withdraw, name="no spaces"),
        lambda: start.step(deposit, make(Deposit, account="x", amount=1, reference=withdraw.out.reference)),
        lambda: start.step(deposit, make(model, account=start.input.amount, amount=1, reference="r")),
        lambda: start.step(deposit, make(model, account="x", amount="1", reference="r")),
        lambda: start.step(deposit, make(model, account="x")),
        lambda: start.step(deposit, make(model, account="x", amount=1, reference="r", nonsense=1)),
        lambda: loose.step("withdraw"),
        lambda: Saga("no spaces", Transfer),
        lambda: Saga("transfer", Transfer, version=0),
        lambda: start.step(withdraw).returns("a constant"),
        lambda: start.compile(),
    ]
    for declare in wrong:
        with pytest.raises(DefinitionError) as caught:
            declare()
        assert caught.value.text.count(" ") > 3, "an error gives advice"


@pytest.mark.feature("A-11")
def test_past_the_pivot_retries_have_no_end_unless_the_activity_says_so_itself() -> None:
    patient = bank_of(retry=RetryPolicy(initial=timedelta(seconds=5), attempts=None, schedule_to_close=None))
    hasty = bank_of(retry=RetryPolicy(attempts=3))
    steps = (
        transfer.step(notify).step(patient, name="patient").step(hasty, name="hasty").compile().engine.steps
    )

    assert steps[0].retry == FORWARD
    assert steps[2].retry == COMPENSATION
    assert steps[3].retry.initial == timedelta(seconds=5)
    assert steps[3].retry.incident_at == COMPENSATION.incident_at, "without end is never without an incident"
    assert steps[4].retry == COMPENSATION


def bank_of(retry: RetryPolicy) -> Activity[Transfer, None, Any]:
    return Participant("other", start_to_close=timedelta(seconds=1), retry=retry).contract(
        "tell", Transfer, type(None), kind=StepKind.RETRIABLE
    )


@pytest.mark.feature("A-11")
def test_a_finite_policy_written_at_a_step_past_the_pivot_is_refused() -> None:
    with pytest.raises(DefinitionError) as caught:
        transfer.step(notify, retry=RetryPolicy(attempts=3))

    assert "attempts=None" in caught.value.text
    assert transfer.step(notify, retry=ENDLESS).compile().engine.steps[2].retry.attempts is None


@pytest.mark.feature("E-06")
def test_an_undo_with_an_end_is_refused() -> None:
    with pytest.raises(DefinitionError) as caught:
        bank_copy().participant.contract(
            "x", Transfer, Receipt, compensated=True, compensation_retry=RetryPolicy()
        )

    assert "attempts=None" in caught.value.text


@pytest.mark.feature("D-01")
@pytest.mark.feature("D-02")
def test_a_handler_with_several_payload_arguments_gets_each_of_them_by_its_place() -> None:
    """What travels is one object with the arguments' names, strict as any payload."""
    pay = paying()
    step = start.step(withdraw).step(pay, arguments(withdraw.out.reference, start.input.amount, 3))
    values = {SAGA_INPUT: INPUT, "withdraw": b'{"reference":"w-1"}'}

    sent = step.compile().step_input(1, values)

    assert json.loads(sent) == {"account": "w-1", "amount": 5, "copies": 3}
    assert pay.input.decode(sent).amount == 5


@pytest.mark.feature("D-01")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((start.input.source, start.input.amount), "takes 3 arguments (account, amount, copies), not 2"),
        ((start.input.source, start.input.amount, 1, 1), "not 4"),
        ((start.input.source, start.input.source, 1), "amount"),
        ((start.input.source, start.input.amount, "1"), "copies"),
    ],
    ids=["too few", "too many", "a reference of another type", "a constant of another type"],
)
def test_arguments_that_do_not_fit_are_refused_where_the_step_is_declared(
    given: tuple[Any, ...], said: str
) -> None:
    """The second and later ones too, as the type checkers do."""
    with pytest.raises(DefinitionError) as caught:
        start.step(paying(), arguments(*given))

    assert said in caught.value.text


@pytest.mark.feature("D-01")
def test_arguments_for_an_activity_with_one_payload_are_refused() -> None:
    for given in (arguments(start.input), arguments(start.input.source, start.input.amount)):
        with pytest.raises(DefinitionError, match="SG101") as caught:
            start.step(withdraw, given)  # type: ignore[misc]
        assert "takes one payload" in caught.value.text


def paying() -> Activity[Any, None, ...]:
    @Participant("till", start_to_close=timedelta(seconds=1)).activity(no_compensation="a test")
    async def pay(account: str, amount: int, copies: int) -> None: ...

    return pay


@pytest.mark.feature("D-01")
def test_a_step_overrides_what_its_activity_says() -> None:
    saga = start.step(
        notify,
        name="told",
        kind=StepKind.COMPENSATABLE,
        retry=RetryPolicy(attempts=2),
        start_to_close=timedelta(seconds=7),
        no_compensation="a letter cannot be unread",
    )
    step = saga.compile().engine.steps[0]

    assert (step.name, step.kind, step.retry.attempts, step.start_to_close_ms) == (
        "told",
        "compensatable",
        2,
        7_000,
    )
    assert step.no_compensation == "a letter cannot be unread"
    assert start.step(withdraw, start_to_close=None).compile().engine.steps[0].start_to_close_ms is None


@pytest.mark.feature("A-11")
def test_a_compensation_may_be_declared_below_the_saga() -> None:
    late = Participant("late", start_to_close=timedelta(seconds=1))

    @late.activity
    async def act(input: Transfer) -> None: ...

    saga = start.step(act)

    @act.compensation
    async def undo(input: Transfer) -> None: ...

    assert saga.compile().engine.steps[0].has_compensation


# --- versions -----------------------------------------------------------------------------------


def transfer_with(**changes: Any) -> Saga[Transfer, None]:
    base = Saga("transfer", Transfer, version=changes.pop("version", 1))
    return base.step(withdraw, **changes)


@pytest.mark.feature("A-13")
@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"retry": RetryPolicy(attempts=3)},
        {"start_to_close": timedelta(seconds=31)},
        {"version": 2},
    ],
    ids=str,
)
def test_another_content_has_another_fingerprint(changes: dict[str, Any]) -> None:
    assert transfer_with(**changes).compile().fingerprint != transfer_with().compile().fingerprint
    assert transfer_with().compile().fingerprint == transfer_with().compile().fingerprint


@pytest.mark.feature("A-13")
def test_a_payload_field_belongs_to_the_content_and_its_prose_does_not() -> None:
    def fingerprint(model: type[BaseModel]) -> str:
        one = Participant("p", start_to_close=None).contract("act", model, type(None), no_compensation="none")
        return Saga("s", model).step(one).compile().fingerprint

    class Plain(BaseModel):
        title: str
        size: int

    class Documented(BaseModel):
        """Says more to people, means the same."""

        size: int = Field(description="in bytes", examples=[3])
        title: str = Field(title="Title of the thing")

    class Wider(BaseModel):
        title: str
        size: int
        colour: str

    class Untitled(BaseModel):
        size: int

    assert fingerprint(Plain) == fingerprint(Documented)
    assert len({fingerprint(Plain), fingerprint(Wider), fingerprint(Untitled)}) == 3


@pytest.mark.feature("A-13")
def test_the_content_is_canonical_json_with_a_format_number() -> None:
    content = transfer.compile().content

    assert json.loads(content)["format"] == 1
    assert content == json.dumps(
        json.loads(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )


@pytest.mark.feature("A-13")
def test_the_fingerprint_is_the_same_in_another_process() -> None:
    program = "from tests.unit.test_definition import transfer; print(transfer.compile().fingerprint)"
    root = Path(__file__).parents[2]

    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }

    assert printed == {transfer.compile().fingerprint}


GOLDEN_FINGERPRINT = "322ab961fda7843b6a76b3ed07cbf029b2954ec31d5a7448b612692c0bad841f"


@pytest.mark.feature("A-13")
def test_the_fingerprint_of_a_known_saga_never_changes() -> None:
    """Instances that are open during an upgrade are found by it; only a new content format may change it."""
    assert transfer.compile().fingerprint == GOLDEN_FINGERPRINT


@pytest.mark.feature("A-13")
def test_versions_stand_side_by_side_and_another_content_under_a_known_one_is_refused() -> None:
    registry = Registry()
    first = registry.register(transfer_with())
    second = registry.register(transfer_with(version=2, name="other"))

    assert registry.register(transfer_with()) is first
    assert registry.served() == {("transfer", 1), ("transfer", 2)}
    assert registry.get("transfer", 2) is second
    assert registry.get("transfer", 3) is None
    with pytest.raises(DefinitionChanged) as caught:
        registry.register(transfer_with(name="changed"))
    assert "version=2" in caught.value.text
    assert registry.get("transfer", 1) is first


@pytest.mark.feature("A-13")
@pytest.mark.parametrize(
    ("name", "version", "says"),
    [("transfer", 9, "served: 1"), ("transfr", 1, "did you mean 'transfer'"), ("zzz", 1, "list of sagas")],
)
def test_an_unknown_saga_is_answered_with_what_comes_close(name: str, version: int, says: str) -> None:
    registry = Registry()
    registry.register(transfer_with())

    with pytest.raises(UnknownSaga) as caught:
        registry.require(name, version)

    assert says in caught.value.text
    assert registry.require("transfer", 1).name == "transfer"
