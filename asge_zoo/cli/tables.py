"""Where commands print their tables."""

import sys
from typing import Any

WIDE = 200  # columns, where no terminal sets their number


def console() -> Any:
    """A rich console on stdout, as wide as the terminal, or wide enough to cut no name."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
