"""Which messages of a partition are unfinished, and up to where it may be committed. Knows nothing of Kafka's clients.

A commit says that everything before it is done, so it ends before the first unfinished message: nine of ten acked with
the first unfinished means that all ten come back after a crash (KAF-8). A window belongs to one assignment: when the
partition is taken away it is dropped, and an ack that comes later finds a window that nobody looks at (KAF-17).
"""

from __future__ import annotations

from collections import OrderedDict


class Held:
    """One handing out of one message: the token of its delivery. Handing it out again makes another one."""

    __slots__ = ("offset", "returns", "window")

    def __init__(self, window: Window, offset: int, returns: int = 0) -> None:
        self.window: Window = window
        self.offset: int = offset
        self.returns: int = returns
        """How often it was given back before."""


class Window:
    """What was fetched of one partition since it was assigned."""

    def __init__(self, partition: int) -> None:
        self.partition: int = partition
        self.position: int = -1
        """Offset after the last that was fetched; -1 before the first."""
        self.committed: int = -1
        """Offset that the cluster knows, at least."""
        self._unfinished: OrderedDict[int, Held] = OrderedDict()

    def __len__(self) -> int:
        """Return how many are unfinished."""
        return len(self._unfinished)

    def add(self, offset: int) -> Held:
        """A message was fetched; offsets rise, and may have holes."""
        if self.position < 0:
            self.committed = offset  # fetching begins at what is committed, or at the log's first
        held = self._unfinished[offset] = Held(self, offset)
        self.position = offset + 1
        return held

    def holds(self, held: Held) -> bool:
        """Whether this handing out is the present one of its message."""
        return self._unfinished.get(held.offset) is held

    def finish(self, held: Held) -> None:
        """The message is done for."""
        del self._unfinished[held.offset]

    def again(self, held: Held) -> Held:
        """Return a new handing out of the same message; the old one settles nothing any more."""
        renewed = self._unfinished[held.offset] = Held(self, held.offset, held.returns + 1)
        return renewed

    @property
    def finished_to(self) -> int:
        """Offset of the first unfinished message, or after the last: what a commit says."""
        return next(iter(self._unfinished), self.position)

    @property
    def ahead(self) -> int:
        """How many offsets lie between the first unfinished message and the end of what was fetched."""
        return self.position - self.finished_to
