"""`asge-zoo plugins`."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asge_zoo.cli import options
from asge_zoo.plugins import GROUPS

if TYPE_CHECKING:
    from asge_zoo.registry import Component


@click.group("plugins")
def plugins() -> None:
    """Write components of your own, and check that they keep their contracts (`ls plugins` lists what there is)."""


@plugins.command("check")
@click.argument("name")
@options.as_json
def check(name: str, as_json: bool) -> int:
    """Check what the component NAME promises: a kind, as acme.lp or pooling:rms, or all of an installed package.

    Exit code 1 if a promise is broken. A dataset's images are checked where they are; nothing is downloaded.
    """
    from asge_zoo.testing import promises

    rows = []
    for group, kind, component in _named(name):
        for promise in promises(component):
            row = {"kind": kind, "component": group, "promise": promise.name, **_outcome(promise)}
            rows.append(row)
            if not as_json:
                print(_line(row), flush=True)
    broken = sum(row["ok"] is False for row in rows)
    if as_json:
        print(json.dumps(rows))
    else:
        print(f"promises checked: {sum(row['ok'] is not None for row in rows)}, broken: {broken}")
    return 1 if broken else 0


@plugins.command("new")
@click.argument("name")
@click.option("--kind", "component", required=True, type=click.Choice(GROUPS), help="What it provides.")
@click.option("--path", type=options.PATH, default=".", help="The folder to make its folder in; default here.")
def new(name: str, component: str, path: Path) -> None:
    """Write a package NAME, as acme-lp, with a working component, its entry point and its tests, to go on from."""
    from asge_zoo.scaffold import write_package

    for file in write_package(name, component, path):
        print(file)
    folder = shlex.quote(os.path.join(os.curdir, path / name))  # so that pip takes it for no name
    print(f"next: pip install -e {folder}\n      pytest {folder}")


def _named(name: str) -> list[tuple[str, str, type["Component"]]]:
    """Group, kind and class of each component that the name stands for.

    Raises:
        PluginError: it stands for none, or for one that can't be imported.
    """
    from asge_zoo.errors import PluginError
    from asge_zoo.plugins import installed, normalized, switch_note
    from asge_zoo.registry import components, find_component, near_miss

    group, colon, kind = name.rpartition(":")
    wanted = [(each, kind) for each in GROUPS if not colon or each == group]
    package = [plugin for plugin in installed() if normalized(plugin.distribution) == normalized(name)]
    wanted += [(plugin.component, plugin.kind) for plugin in package]
    found = [(*each, component) for each in wanted if (component := find_component(*each))]
    if not found:
        known = {kind for each in GROUPS for kind in components(each)}
        known.update(text for plugin in installed() for text in (plugin.kind, plugin.distribution))
        raise PluginError(f"no component or package '{name}'{near_miss(kind, sorted(known))}{switch_note()}")
    return list(dict.fromkeys(found))


def _outcome(promise: Any) -> dict[str, Any]:
    """`ok`, None for what can't be checked here, and the message where it is not true."""
    from asge_zoo.testing import BrokenPromise, NotChecked

    try:
        promise.check()
    except BrokenPromise as error:
        return {"ok": False, "message": str(error)}
    except NotChecked as error:
        return {"ok": None, "message": str(error)}
    return {"ok": True, "message": None}


def _line(row: dict[str, Any]) -> str:
    outcome = {True: "ok", False: "broken", None: "not checked"}[row["ok"]]
    text = {True: row["promise"], False: row["message"], None: f"{row['promise']}: {row['message']}"}[row["ok"]]
    return f"{outcome:<11} {row['component']}:{row['kind']} {text}"
