"""Writes docs/settings.md from the settings in the code: `python -m devservices.settings_page`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from saga import settings

PAGE: Final = Path(__file__).parents[1] / "docs" / "settings.md"


def main() -> None:
    """Write the page."""
    PAGE.write_text(settings.reference())


if __name__ == "__main__":
    main()
