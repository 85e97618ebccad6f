"""`asge-zoo ls`."""

import json
from pathlib import Path
from typing import Any

import click

from asge_zoo.cli import options, tables


@click.command("ls")
@click.argument("what", metavar="WHAT", type=click.Choice(["specs", "components", "plugins", "datasets", "models"]))
@options.data_root
@options.as_json
def ls(what: str, data_root: Path | None, as_json: bool) -> None:
    """List shipped specs, components by group, what plugins provide, datasets and where they lie, or models.

    Models are those that come with the package, and those in the Hub's cache.
    """
    if what == "specs":
        rows = _specs()
    elif what == "components":
        rows = _components()
    elif what == "plugins":
        rows = _plugins()
    elif what == "models":
        rows = _models()
    else:
        rows = _datasets(data_root)
    if as_json:
        print(json.dumps(rows))
        return
    from rich.table import Table

    if not rows:
        print(f"no {what} are installed")
        return
    table = Table(box=None, pad_edge=False)
    shown = [column for column in rows[0] if not column.endswith("sha256")]
    for column in shown:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in shown))
    tables.console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _specs() -> list[dict[str, Any]]:
    from asge_zoo.spec import default_kind, shipped_specs

    rows = []
    for name, path in shipped_specs().items():
        raw = json.loads(path.read_text())
        fields = ("data", "backbone", "rule", "prediction")
        rows.append({"spec": name, **{key: raw.get(key, {}).get("kind", default_kind(key)) for key in fields}})
    return rows


def _components() -> list[dict[str, Any]]:
    from asge_zoo.registry import ROOMS, components

    return [
        {"group": group, "kind": kind, "summary": (component.__doc__ or "").strip().splitlines()[0]}
        for group in ROOMS
        for kind, component in components(group).items()
    ]


def _plugins() -> list[dict[str, Any]]:
    from asge_zoo.registry import load_plugins

    return [
        {
            "kind": plugin.kind,
            "component": plugin.component,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "error": str(error) if error else None,
        }
        for plugin, error in load_plugins()
    ]


def _models() -> list[dict[str, Any]]:
    from asge_zoo.hub.models import known_models

    return known_models()


def _datasets(given: Path | None) -> list[dict[str, Any]]:
    from asge_zoo.data.base import data_root
    from asge_zoo.data.found import datasets_found

    return datasets_found(data_root(given))
