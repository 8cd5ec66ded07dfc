"""An environment of the money transfer with its accounts opened."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from saga.testing import Environment
from tests.testing.bank import metadata, money_transfer, open_accounts


@pytest.fixture
async def env() -> AsyncIterator[Environment]:
    async with Environment(money_transfer, tables=metadata) as made:
        await open_accounts(made)
        yield made
