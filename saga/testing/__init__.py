"""What a user tests sagas with: run one in process on a virtual clock, let any step go wrong, try everything at once.

`Environment` and `try_all` need no test framework; under pytest the fixture `saga_env` makes environments. The contract
that every broker adapter keeps is in `saga.testing.contract`.
"""

from saga.testing.clock import VirtualClock
from saga.testing.driver import StoodStill
from saga.testing.environment import Ended, Environment, LeftBehind
from saga.testing.faults import ALWAYS, Fault, FaultKind, Faults, InjectedFailure
from saga.testing.started import Started, started
from saga.testing.trials import Case, Report, TrialsFailed, try_all

__all__ = [
    "ALWAYS",
    "Case",
    "Ended",
    "Environment",
    "Fault",
    "FaultKind",
    "Faults",
    "InjectedFailure",
    "LeftBehind",
    "Report",
    "Started",
    "StoodStill",
    "TrialsFailed",
    "VirtualClock",
    "started",
    "try_all",
]
