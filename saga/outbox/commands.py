"""Writing commands: which payloads a dispatch needs, and the outbox row it becomes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from uuid import UUID

from saga.definition.builder import SagaDefinition
from saga.definition.refs import SAGA_INPUT
from saga.engine.effects import Dispatch
from saga.messages import NULL, Command, Direction, commands_channel, encode_command, replies_channel
from saga.storage.base import OutboxRow, ValueKey, ValueRow, part_of

INPUT: Final = "input"
OUTPUT: Final = "output"
UNDO: Final = "undo"

Values = Mapping[ValueKey, bytes]


def said_kind(direction: str, attempt: int) -> str:
    """Return the kind under which what a failed or refusing attempt said is kept."""
    return f"{direction}.said.{attempt}"


def output_keys(run_id: UUID, steps: frozenset[str]) -> set[ValueKey]:
    """Return the keys of the outputs of these steps."""
    return {ValueKey(run_id, step, 0, 0, OUTPUT) for step in steps if step != SAGA_INPUT}


def needed(definition: SagaDefinition, run_id: UUID, dispatch: Dispatch) -> set[ValueKey]:
    """Return the payloads that the dispatched command is made of, save the saga's own input."""
    step = definition.steps[dispatch.step]
    keys: set[ValueKey] = set()
    if dispatch.direction is Direction.CLOSE:
        return keys
    if dispatch.direction is Direction.COMPENSATE:
        keys |= {ValueKey(run_id, step.name, 0, 0, OUTPUT), ValueKey(run_id, step.name, 0, 0, UNDO)}
    if step.unchanged:
        return keys
    return keys | (output_keys(run_id, step.needs) if _first(dispatch) else {_input_key(run_id, step.name)})


def _first(dispatch: Dispatch) -> bool:
    return dispatch.direction is Direction.FORWARD and dispatch.attempt == 1 and not dispatch.resend


def _input_key(run_id: UUID, step: str) -> ValueKey:
    return ValueKey(run_id, step, 0, 0, INPUT)


def payload(
    definition: SagaDefinition, run_id: UUID, dispatch: Dispatch, saga_input: bytes, values: Values
) -> tuple[bytes, ValueRow | None]:
    """Return a command's `data`, and the step's input to be kept if it was made now.

    A step's input is serialised once, when it is first sent; every later sending carries those bytes (P32). An undo
    also carries what a participant without a barrier needs (P21), a fence the input for the action's inquiry.
    """
    if dispatch.direction is Direction.CLOSE:
        return NULL, None
    step = definition.steps[dispatch.step]
    made: ValueRow | None = None
    if step.unchanged:
        input = saga_input
    elif _first(dispatch):
        outputs = {name: values.get(ValueKey(run_id, name, 0, 0, OUTPUT), NULL) for name in step.needs}
        input = definition.step_input(dispatch.step, {SAGA_INPUT: saga_input, **outputs})
        made = ValueRow(_input_key(run_id, step.name), input)
    elif dispatch.direction is Direction.FENCE:
        # not kept yet where the fence is decided in the batch that would have sent the action: nothing ran to ask about
        input = values.get(_input_key(run_id, step.name), NULL)
    else:
        input = values[_input_key(run_id, step.name)]
    if dispatch.direction is Direction.FORWARD:
        return input, made
    if dispatch.direction is Direction.FENCE:
        return b'{"input":' + input + b"}", None
    output = values.get(ValueKey(run_id, step.name, 0, 0, OUTPUT), NULL)
    undo = values.get(ValueKey(run_id, step.name, 0, 0, UNDO), NULL)
    return b'{"input":' + input + b',"output":' + output + b',"undo":' + undo + b"}", made


def outbox_row(
    namespace: str,
    definition: SagaDefinition,
    runid: str,
    saga_id: str,
    dispatch: Dispatch,
    data: bytes,
    message_id: UUID,
) -> OutboxRow:
    """Return the row that carries the command."""
    step = definition.steps[dispatch.step]
    command = Command(
        id=str(message_id),
        namespace=namespace,
        saga=definition.name,
        sagaversion=definition.version,
        sagaid=saga_id,
        runid=runid,
        step=step.name,
        activity=step.activity.name,
        round=dispatch.round,
        direction=dispatch.direction.value,
        commandid=dispatch.command_id,
        attempt=dispatch.attempt,
        resend=dispatch.resend,
        final=dispatch.final,
        remainingms=dispatch.remaining_ms,
        replyto=replies_channel(namespace),
    )
    return OutboxRow(
        message_id,
        part_of(runid),
        commands_channel(namespace, step.queue),
        runid,
        encode_command(command, data),
    )
