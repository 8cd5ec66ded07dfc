"""Every error the library raises: a stable code, where it happened, and what to do about it.

`str(error)` holds class, code, saga and step only, so that logging one never prints a payload.
Our own advice (written by us, free of payloads) is the attribute `text` and is attached as a note,
which tracebacks show; text that came from a participant stays an attribute and nothing else.
"""

from __future__ import annotations

from typing import Any, ClassVar


class SagaError(Exception):
    """The saga library could not do what was asked."""

    code: ClassVar[str] = "SG000"

    def __init__(
        self,
        text: str = "",
        *,
        saga: str | None = None,
        step: str | None = None,
        saga_id: str | None = None,
    ) -> None:
        self.text: str = text or (type(self).__doc__ or "").splitlines()[0]
        self.saga = saga
        self.step = step
        self.saga_id = saga_id
        super().__init__(self.text)
        self.add_note(self.text)

    def __str__(self) -> str:
        where = "".join(
            f" {name}={value}" for name, value in (("saga", self.saga), ("step", self.step)) if value
        )
        return f"{type(self).__name__} [{self.code}]{where}"


# --- declaration: found before anything runs -------------------------------------------------


class DefinitionError(SagaError):
    """The declaration of a saga, step or activity breaks a rule."""

    code = "SG101"


class DuplicateActivity(DefinitionError):
    """Two activities of one process have the same name on the same queue."""

    code = "SG102"


class DefinitionChanged(SagaError):
    """Another content is already stored under this saga's name and version; raise the version."""

    code = "SG103"


class UnknownSaga(SagaError):
    """This app declares no saga of that name and version."""

    code = "SG104"


# --- start-up: found before the first message ------------------------------------------------


class ConfigurationError(SagaError):
    """A setting, URL or object given to the app does not fit."""

    code = "SG201"


class MissingExtra(ConfigurationError):
    """An optional package is needed for this database or broker."""

    code = "SG202"


class MissingCapability(ConfigurationError):
    """The chosen broker cannot do what this declaration needs."""

    code = "SG203"


class SchemaMismatch(SagaError):
    """The database does not have the tables, columns and indexes of this release."""

    code = "SG204"


class UnsupportedDatabase(ConfigurationError):
    """The database server, its version or its settings are not supported."""

    code = "SG205"


class InsecureLink(ConfigurationError):
    """A link to another host is in plain text or checks nobody, which production mode refuses."""

    code = "SG207"


class TopologyMismatch(SagaError):
    """A queue or exchange exists on the broker with other arguments than ours."""

    code = "SG206"


class RetentionTooShort(ConfigurationError):
    """Barrier rows would go before the last command that needs them has come."""

    code = "SG208"


# --- calls ------------------------------------------------------------------------------------


class PayloadTooLarge(SagaError):
    """A payload is above the limit of 256 KiB."""

    code = "SG301"


class PayloadInvalid(SagaError):
    """A payload does not match its declared type."""

    code = "SG302"


class StartConflict(SagaError):
    """This id was started before with another input."""

    code = "SG303"


class AlreadyOpen(SagaError):
    """An instance with this id is open, and the call said `if_open="fail"`."""

    code = "SG304"


class AlreadyClosed(SagaError):
    """An instance with this id has ended, and the call said `if_closed="fail"` or the like."""

    code = "SG305"


class WrongDatabase(SagaError):
    """The session given belongs to another database than the coordinator's."""

    code = "SG306"


class SagaNotFound(SagaError):
    """There is no instance with this id or run id in this namespace."""

    code = "SG307"


class PastPivot(SagaError):
    """The saga is past its pivot: it can only go forward."""

    code = "SG308"


class VerbNotAllowed(SagaError):
    """The instance is in a state in which this verb means nothing or is too dangerous.

    `allowed` names the verbs that its state allows.
    """

    code = "SG313"

    def __init__(
        self,
        text: str = "",
        *,
        saga: str | None = None,
        step: str | None = None,
        saga_id: str | None = None,
        allowed: tuple[str, ...] = (),
    ) -> None:
        super().__init__(text, saga=saga, step=step, saga_id=saga_id)
        self.allowed = allowed


class ReasonRequired(SagaError):
    """This verb needs a reason, which is kept in the audit row."""

    code = "SG314"


class SeveralFound(SagaError):
    """Sagas of different names have an instance of this id."""

    code = "SG316"


class DeadLetterNotFound(SagaError):
    """There is no parked message of this id."""

    code = "SG315"


class PastCompensation(SagaError):
    """The saga is compensating or compensated: its forward path is closed for good."""

    code = "SG309"


class WouldDeadlock(SagaError):
    """`client.start` without `session=` inside a handler that holds the one SQLite writer."""

    code = "SG310"


class SessionIsManaged(SagaError):
    """The handler's session is committed, rolled back and closed by the library."""

    code = "SG311"


class ResultTimeout(SagaError):
    """The saga has not ended within the time given; it goes on."""

    code = "SG312"


# --- how a saga ended -------------------------------------------------------------------------


class SagaEnded(SagaError):
    """The saga ended without a result."""

    code = "SG400"


class SagaCompensated(SagaEnded):
    """The saga was rolled back: every effect before the failure is undone."""

    code = "SG401"

    def __init__(
        self,
        text: str = "",
        *,
        saga: str | None = None,
        step: str | None = None,
        saga_id: str | None = None,
        reason: str = "",
        details: Any = None,
        undone: tuple[str, ...] = (),
    ) -> None:
        super().__init__(text, saga=saga, step=step, saga_id=saga_id)
        self.reason = reason
        self.details = details
        self.undone = undone


class SagaTerminated(SagaEnded):
    """The saga was stopped by a person, without undo; the audit row names the effects that stand."""

    code = "SG404"


class SagaAbandoned(SagaEnded):
    """The saga was given up by a person while it needed attention; the audit row names the effects that stand."""

    code = "SG405"


# --- infrastructure ---------------------------------------------------------------------------


class StorageUnavailable(SagaError):
    """The database cannot be reached or did not answer in time; the call may be repeated."""

    code = "SG501"


class StorageBusy(SagaError):
    """The database refused the transaction several times in a row (locks); the call may be repeated."""

    code = "SG502"


class BrokerUnavailable(SagaError):
    """The broker cannot be reached or did not answer in time; nothing is lost."""

    code = "SG503"


class BrokerFull(SagaError):
    """A bounded queue of the in-process broker is full."""

    code = "SG504"


class MessageInvalid(SagaError):
    """A message on the wire is not a command or reply of this protocol; it is parked."""

    code = "SG505"

    def __init__(self, text: str = "", *, reason: str = "message_invalid") -> None:
        super().__init__(text)
        self.reason = reason
        """Short word under which it is parked."""
