"""The apps of the money transfer: all in one process on one SQLite file, or each a service with a database of its own.

    saga coordinator examples.money_transfer.apps:coordinator
    saga participant examples.money_transfer.apps:savings

Where the services find their databases and the broker is read from the environment, e.g. MONEY_TRANSFER_GIRO_DATABASE.
The tables stand in the schema that `SCHEMAS` names and the role of the service owns; the SQL of the example names none.
"""

from typing import Any, Final

from pydantic_settings import BaseSettings

from examples.money_transfer import batched as in_batches
from examples.money_transfer import transfer as one_by_one
from saga import App, Participant


class Settings(BaseSettings, env_prefix="MONEY_TRANSFER_"):
    broker: str = "amqp://guest:guest@127.0.0.1/"
    coordinator_database: str = "postgresql://money_coordinator@127.0.0.1/money"
    savings_database: str = "postgresql://money_savings@127.0.0.1/money"
    giro_database: str = "postgresql://money_giro@127.0.0.1/money"
    notifier_database: str = "postgresql://money_notifier@127.0.0.1/money"
    batched: bool = False
    """Handlers that take many commands at once."""


SCHEMAS: Final = {service: f"money_{service}" for service in ("coordinator", "savings", "giro", "notifier")}


def embedded(database: str = "sqlite:///money.db", *, batched: bool = False, **options: Any) -> App:
    """Return the one app that does everything in one process."""
    form = in_batches if batched else one_by_one
    participants = [form.savings, form.giro, form.notifier]
    return App(database, sagas=[form.money_transfer], participants=participants, **options)


def coordinating(settings: Settings, **options: Any) -> App:
    """Return the app of the service that runs the sagas; whoever starts them uses it as well."""
    options = {"broker": settings.broker, "schema": SCHEMAS["coordinator"], **options}
    return App(settings.coordinator_database, sagas=[one_by_one.money_transfer], **options)


def participating(name: str, settings: Settings, **options: Any) -> App:
    """Return the app of a service that owns activities: `savings`, `giro` or `notifier`."""
    options = {"broker": settings.broker, "schema": SCHEMAS[name], **options}
    participant: Participant = getattr(in_batches if settings.batched else one_by_one, name)
    return App(getattr(settings, f"{name}_database"), participants=[participant], **options)


coordinator = starter = coordinating(Settings())
savings = participating("savings", Settings())
giro = participating("giro", Settings())
notifier = participating("notifier", Settings())
