"""Where commands print their tables."""

import sys
from collections.abc import Sequence
from typing import Any

WIDE = 200  # columns, where no terminal sets their number


def console() -> Any:
    """A rich console on stdout, as wide as the terminal, or wide enough to cut no name."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def table(title: str, columns: Sequence[str]) -> Any:
    """A rich table without lines; the columns after the first are numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=True)
    return made
