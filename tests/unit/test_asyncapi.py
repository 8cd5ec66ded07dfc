"""Row D-18: the AsyncAPI document is one, and says of every message on the wire page what that page says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from jsonschema import Draft7Validator, Draft202012Validator
from pydantic import BaseModel

from saga import Participant, asyncapi
from tests.unit.test_wire_vectors import VECTORS

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("D-18")]

ROOT: Final = Path(__file__).parents[2]
OFFICIAL: Final = Draft7Validator(json.loads((ROOT / "tests/wire/asyncapi-3.0.0.json").read_text()))
MESSAGES: Final = {
    name: message
    for name, text in VECTORS.items()
    if isinstance(message := json.loads(text), dict) and "direction" in message
}
"""Of the activity `withdraw`, as all of them on the page are."""


class Order(BaseModel):
    source: str
    target: str
    amount: int


class Receipt(BaseModel):
    reference: str


bank = Participant("bank")
bank.contract("withdraw", input=Order, output=Receipt, start_to_close=None)


def document() -> dict[str, Any]:
    return asyncapi.document("bank", "7", "default", bank.activities.values())


def errors(name: str, message: Any) -> list[str]:
    """Return what the document holds against a message of that name."""
    whole = document()
    payload = whole["components"]["messages"][name]["payload"]["schema"]
    schema = {**payload, "components": whole["components"]}
    return [error.message for error in Draft202012Validator(schema).iter_errors(message)]


def name_of(message: dict[str, Any]) -> str:
    parts = ("bank.withdraw", message["direction"], message.get("outcome"))
    return ".".join(filter(None, parts))


def test_the_document_is_valid_asyncapi() -> None:
    assert list(OFFICIAL.iter_errors(document())) == []
    spoilt = {**document(), "operations": {"bank.withdraw": {"action": "wait"}}}
    assert list(OFFICIAL.iter_errors(spoilt))


def test_every_reference_leads_somewhere() -> None:
    whole = document()

    def follow(node: Any) -> None:
        if isinstance(node, list):
            for each in node:
                follow(each)
        elif isinstance(node, dict):
            if "$ref" in node:
                found: Any = whole
                for part in node["$ref"].removeprefix("#/").split("/"):
                    found = found[part]
            for each in node.values():
                follow(each)

    follow(whole)


@pytest.mark.feature("D-18", acceptance=True)
@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_of_the_wire_page_is_what_the_document_says(name: str) -> None:
    message = MESSAGES[name]
    assert errors(name_of(message), message) == []


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_that_misses_what_it_must_have_is_none(name: str) -> None:
    message = dict(MESSAGES[name])
    del message["commandid"]
    assert errors(name_of(message), message)


def test_a_payload_is_described_by_its_model() -> None:
    message = {**MESSAGES["command-forward"], "data": {"source": "alice", "target": "bob", "amount": "500"}}
    assert errors("bank.withdraw.forward", message)
    refused = {**MESSAGES["reply-done"], "data": {"output": {"number": 1}, "undo": None}}
    assert errors("bank.withdraw.forward.done", refused)


def test_models_of_one_name_are_told_apart() -> None:
    other = Participant("post")

    def receipt() -> type[BaseModel]:
        class Receipt(BaseModel):
            weight: int

        return Receipt

    other.contract("send", input=Order, output=receipt(), start_to_close=None)
    both = [*bank.activities.values(), *other.activities.values()]
    schemas = asyncapi.document("both", "1", "default", both)["components"]["schemas"]
    properties = [set(schema.get("properties", {})) for name, schema in schemas.items() if "Receipt" in name]
    assert sorted(map(sorted, properties)) == [["reference"], ["weight"]]


def test_the_command_line_prints_the_document_of_an_app(tmp_path: Path) -> None:
    (tmp_path / "bank_app.py").write_text(
        "from examples.money_transfer.apps import embedded\napp = embedded('sqlite:///never.db')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "saga.cli", "asyncapi", "bank_app:app", "--title", "money"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    printed = json.loads(ran.stdout)
    assert list(OFFICIAL.iter_errors(printed)) == []
    assert printed["info"]["title"] == "money"
    assert printed["channels"]["commands.giro"]["address"] == "saga.default.commands.giro"
    assert not (tmp_path / "never.db").exists()
