"""`asge-zoo schema`."""

import json
import sys

import click

from asge_zoo.cli import options


@click.command("schema")
@options.as_json
def schema(as_json: bool) -> None:
    """Print the JSON Schema of specs, for editors to complete and check by; it is JSON with or without --json.

    Installed plugins are in it; one that does not work is named on stderr.
    """
    from asge_zoo.registry import load_plugins
    from asge_zoo.spec import json_schema

    for _, error in load_plugins():
        if error:
            print(f"asge-zoo: {error}", file=sys.stderr)
    print(json.dumps(json_schema(), indent=2))
