"""`asge-zoo schema`."""

import json

import click

from asge_zoo.cli import options


@click.command("schema")
@options.as_json
def schema(as_json: bool) -> None:
    """Print the JSON Schema of specs, for editors to complete and check by; it is JSON with or without --json."""
    from asge_zoo.spec import json_schema

    print(json.dumps(json_schema(), indent=2))
