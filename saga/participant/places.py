"""Where in the user's code an exception was raised: file and line, which may be shown where its text may not (L-11)."""

from __future__ import annotations

from pathlib import PurePath
from traceback import walk_tb
from typing import Final

OURS: Final = "saga"


def place(error: BaseException) -> str:
    """Return `folder/file.py:88` of the innermost frame in the handler's own package; "" if no handler was reached.

    The outermost frame that is not ours is the handler, wherever its package is installed.
    """
    package = found = ""
    for frame, line in walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if not package and name != OURS:
            package = name
        if package and name == package:
            found = f"{'/'.join(PurePath(frame.f_code.co_filename).parts[-2:])}:{line}"
    return found
