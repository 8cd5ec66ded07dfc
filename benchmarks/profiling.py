"""Where the time of a process goes: every call counted (`calls`, which slows it down) or a look every 2 ms (`samples`).

Samples are taken by processor time, so waiting costs nothing and small functions are not made to look expensive.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import signal
import sysconfig
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final

SAMPLE_SECONDS: Final = 0.002
HOW: Final = ("calls", "samples")
_PREFIXES: Final = tuple(
    f"{path}/"
    for path in sorted({*map(str, sysconfig.get_paths().values()), str(Path(__file__).parents[1])}, key=len)[
        ::-1
    ]
)


class Profiler:
    """Profiles the thread that starts it."""

    def __init__(self, how: str) -> None:
        self._calls = cProfile.Profile() if how == "calls" else None
        self._own: Counter[str] = Counter()
        self._all: Counter[str] = Counter()
        self._packages: Counter[str] = Counter()
        self._ours: Counter[str] = Counter()

    def start(self) -> None:
        if self._calls is not None:
            self._calls.enable()
        else:
            signal.signal(signal.SIGPROF, self._sample)
            signal.setitimer(signal.ITIMER_PROF, SAMPLE_SECONDS, SAMPLE_SECONDS)

    def stop(self, top: int) -> str:
        """Stop and return the table."""
        if self._calls is not None:
            self._calls.disable()
            text = io.StringIO()
            stats = pstats.Stats(self._calls, stream=text)
            stats.sort_stats("tottime").print_stats(top)
            stats.sort_stats("cumulative").print_stats(top)
            return text.getvalue()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        total = max(sum(self._own.values()), 1)
        parts = [f"{total} samples"]
        for title, counter in (
            ("by package, own time", self._packages),
            ("by function of saga, with the libraries that it calls itself", self._ours),
            ("by function, own time", self._own),
            ("by function, with what it calls", self._all),
        ):
            lines = [f"{100 * count / total:6.1f} %  {name}" for name, count in counter.most_common(top)]
            parts.append("\n".join([title, *lines]))
        return "\n\n".join(parts)

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        seen: set[str] = set()
        first = mine = True
        while frame is not None:
            name, package = _names(frame)
            if first:
                self._own[name] += 1
                self._packages[package] += 1
                first = False
            if mine and package.startswith("saga/"):
                self._ours[name] += 1
                mine = False
            if name not in seen:
                seen.add(name)
                self._all[name] += 1
            frame = frame.f_back


def _names(frame: FrameType) -> tuple[str, str]:
    code = frame.f_code
    path = code.co_filename
    for prefix in _PREFIXES:
        if path.startswith(prefix):
            path = path[len(prefix) :]
            break
    parts = path.split("/")
    package = "/".join(parts[:2]) if parts[0] == "saga" else parts[0]
    return f"{path}:{code.co_firstlineno} {code.co_qualname}", package
