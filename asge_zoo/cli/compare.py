"""`asge-zoo compare`."""

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

from asge_zoo.cli import options, tables


@click.command("compare")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=options.PATH)
@options.as_json
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Print what each RUN was and came to, side by side, with the accuracy of each unit (the paper's Figures 1 and 3).

    Test accuracy where a run has been tested, else validation accuracy at its best epoch. Needs no plugin.
    """
    from asge_zoo.report.compare import summarize

    found = [summarize(run) for run in runs]
    if as_json:
        print(json.dumps(found))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", *(each["run_dir"] for each in found)):
        table.add_column(column, overflow="fold")
    for label, values in _rows(found):
        table.add_row(label, *("-" if value is None else str(value) for value in values))
    tables.console().print(table)


def _rows(found: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    rows = [("spec", [each["name"] for each in found])]
    rows += [(field, [_kind(each[field]) for each in found]) for field in ("backbone", "rule", "prediction")]
    rows.append(("epochs (best)", [f"{each['epochs']} ({each['best_epoch']})" for each in found]))
    rows += [
        (label, [None if each[key] is None else f"{each[key]:.2f} %" for each in found])
        for label, key in (("validation", "validation_accuracy"), ("test", "test_accuracy"))
    ]
    tested = [each["unit_test_accuracy"] or each["unit_accuracy"] for each in found]
    for number, units in enumerate(zip_longest(*tested), start=1):
        rows.append((f"unit {number}", [None if accuracy is None else f"{accuracy:.2f} %" for accuracy in units]))
    return rows


def _kind(component: Any) -> str | None:
    return component.get("kind") if isinstance(component, dict) else None
