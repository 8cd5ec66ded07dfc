"""The contract of the broker port as named behaviours, for our adapters and for those of others.

Give a `Harness` for your adapter and run each of `BEHAVIOURS` against a new one. Under pytest that is one test,
parametrised by name:

    @pytest.mark.parametrize("name", BEHAVIOURS)
    async def test_my_broker(name):
        harness = MyHarness()
        if reason := BEHAVIOURS[name].reason_to_skip(harness.capabilities):
            pytest.skip(reason)
        await run(BEHAVIOURS[name], harness)

A behaviour is skipped only because a declared capability is missing. Nothing here depends on a test framework.
"""

from saga.testing.contract import (
    consuming,
    content,
    ending,
    losses,
    order,
    publishing,
    settling,
    topology,
)
from saga.testing.contract.harness import ContractBroken, Harness
from saga.testing.contract.registry import BEHAVIOURS, Behaviour, run

__all__ = ["BEHAVIOURS", "Behaviour", "ContractBroken", "Harness", "run"]

# Importing these has registered their behaviours.
_: object = (consuming, content, ending, losses, order, publishing, settling, topology)
